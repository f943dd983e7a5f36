"""Spend a budget along the lower convex hulls of (size, loss) curves, one curve a matrix.

Optimal wherever a step of a hull ends: there the Lagrangian's one price per unit holds for all
(Fox, Management Science 13(3), 1966; Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988, for hulls).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from operator import itemgetter

# (size, predicted loss) of one matrix, sizes ascending.
Curve = Sequence[tuple[int, float]]


def fill(curves: Mapping[str, Curve], budget: int) -> dict[str, int]:
    """The size of every matrix, from the first of its curve on, within a budget of the same unit.

    A step of a hull that does not fit gives way to the hull of the sizes that do. Of equal rates
    the smaller share, then the first matrix, goes first.
    """
    held = {path: curve[0] for path, curve in curves.items()}
    rest = budget - sum(size for size, _ in held.values())
    hulls = {path: hull(curve) for path, curve in curves.items()}
    queue: list[tuple[float, float, int, str]] = []

    def offer(index: int, path: str) -> None:
        if hulls[path]:
            (size, loss), (larger, less) = held[path], hulls[path][-1]
            rate = (loss - less) / (larger - size)
            heappush(queue, (-rate, size / curves[path][-1][0], index, path))

    for index, path in enumerate(curves):
        offer(index, path)
    while queue:
        *_, index, path = heappop(queue)
        size, larger = held[path][0], hulls[path][-1][0]
        if larger - size <= rest:
            held[path] = hulls[path].pop()
            rest -= larger - size
        else:
            first = bisect_left(curves[path], size, key=itemgetter(0))
            last = bisect_right(curves[path], size + rest, key=itemgetter(0))
            hulls[path] = hull(curves[path][first:last])
        offer(index, path)
    return {path: size for path, (size, _) in held.items()}


def hull(curve: Curve) -> list[tuple[int, float]]:
    """The lower convex hull without its first point, the last point first."""
    found: list[tuple[int, float]] = []
    for size, loss in curve:
        while len(found) > 1:
            (before, high), (middle, low) = found[-2:]
            if (loss - low) * (middle - before) >= (low - high) * (size - middle):
                break
            found.pop()
        found.append((size, loss))
    return found[:0:-1]
