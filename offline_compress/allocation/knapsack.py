"""One offer per matrix, so that the predicted losses add up to the least within the budget.

A multiple-choice knapsack. On the lower convex hulls of (bytes, loss) the greedy order of the
steepest loss per byte is the Lagrangian optimum (Shoham and Gersho, IEEE Trans. ASSP 36, 1988);
what the last step leaves of the budget goes to the offers that still fit.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar, Literal

from offline_compress.allocation.allocator import Allocator, Asks, Evidence, Offer, Shares


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
        sizes = {path: matrix.size for path, matrix in evidence.matrices.items()}
        hulls = {path: hull(menus[path]) for path in sizes}
        taken = {path: offers[0] for path, offers in hulls.items()}
        spent = sum(taken[path].share * size for path, size in sizes.items())
        left = kept * sum(sizes.values()) - spent
        steps = sorted(
            (
                (before.loss - after.loss) / float((after.share - before.share) * sizes[path]),
                order,
                path,
                after,
            )
            for order, (path, offers) in enumerate(hulls.items())
            for before, after in pairwise(offers)
        )
        blocked: set[str] = set()
        for _, _, path, offer in reversed(steps):
            cost = (offer.share - taken[path].share) * sizes[path]
            if path in blocked or cost > left:
                blocked.add(path)  # later steps of this matrix cost more still
                continue
            taken[path], left = offer, left - cost
        self._spend(menus, sizes, taken, left)
        return {path: offer.share for path, offer in taken.items()}

    @staticmethod
    def _spend(
        menus: Mapping[str, Sequence[Offer]],
        sizes: dict[str, int],
        taken: dict[str, Offer],
        left: Fraction,
    ) -> None:
        """Use what is left for single better offers, the largest gain first."""
        while True:
            better = [
                (taken[path].loss - offer.loss, -order, path, offer)
                for order, (path, size) in enumerate(sizes.items())
                for offer in menus[path]
                if offer.loss < taken[path].loss
                and (offer.share - taken[path].share) * size <= left
            ]
            if not better:
                return
            _, _, path, offer = max(better)
            left -= (offer.share - taken[path].share) * sizes[path]
            taken[path] = offer


def hull(offers: Sequence[Offer]) -> list[Offer]:
    """The offers on the lower convex hull, from the cheapest to the one of the least loss."""
    found: list[Offer] = []
    for offer in sorted(offers):  # of the same share the one that loses least comes first
        if found and offer.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], offer) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(offer)
    return found


def _slope(a: Offer, b: Offer) -> float:
    return (b.loss - a.loss) / float(b.share - a.share)
