"""One offer per matrix, so that the predicted losses add up to the least within the budget.

A multiple-choice knapsack, solved greedily on the lower convex hulls of (bytes, loss); see
allocation.greedy for what that guarantees.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

from offline_compress.allocation.allocator import Allocator, Asks, Evidence, Offer, Shares
from offline_compress.allocation.greedy import Curve, fill


class Knapsack(Allocator):
    """For methods that predict what each of several artefacts of a matrix would lose."""

    paper: ClassVar[str] = "Shoham and Gersho, IEEE Trans. ASSP 36 (1988)"

    name: Literal["knapsack"] = "knapsack"

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"menus"})

    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        """The cheapest offer of every matrix, whatever the budget, and more as far as it goes."""
        menus = evidence.menus or {}
        sizes = {path: _UNITS * matrix.size for path, matrix in evidence.matrices.items()}
        curves = {path: _curve(menus[path], size) for path, size in sizes.items()}
        held = fill(curves, int(kept * sum(sizes.values())))
        return {path: Fraction(held[path], size) for path, size in sizes.items()}


# Bytes are whole in quarters of a dense parameter, for weights of 16 and of 32 bits.
_UNITS = 4


def _curve(offers: Sequence[Offer], size: int) -> Curve:
    """The offers that lose less than every smaller one, sizes ascending."""
    best: list[tuple[int, float]] = []
    for share, loss in sorted(offers):
        if not best or loss < best[-1][1]:
            best.append((int(share * size), loss))
    return best
