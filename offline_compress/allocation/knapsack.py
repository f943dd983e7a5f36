"""One offer per matrix, so that the predicted losses add up to the least within the budget.

A multiple-choice knapsack, solved greedily on the lower convex hulls of (bytes, loss); see
allocation.greedy for what that guarantees.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from offline_compress.allocation.allocator import Allocator, Asks, Evidence, Offer, Shares
from offline_compress.allocation.budget import UNITS
from offline_compress.allocation.greedy import Curve, fill


class Knapsack(Allocator):
    """For methods that predict what each of several artefacts of a matrix would lose.

    No matrix takes less than `floor` of the uniform share, if it has an offer in between: on
    another text it may count for more. Of `auto` on wiki-llama-xs at 0.2 (its damping at 0.01), KL
    to dense on the domain of the calibration and on Python: 4.3e-4 and 4.2e-3 at 0, 3.8e-4 and
    3.1e-3 at 0.6, 4.3e-4 and 2.1e-3 at 0.8.
    """

    paper: ClassVar[str] = "Shoham and Gersho, IEEE Trans. ASSP 36 (1988)"

    name: Literal["knapsack"] = "knapsack"
    floor: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.6

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"menus"})

    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        """The cheapest offer of every matrix, whatever the budget, and more as far as it goes."""
        menus = evidence.menus or {}
        sizes = {path: UNITS * matrix.size for path, matrix in evidence.matrices.items()}
        floor = Fraction(str(self.floor)) * kept
        above = {path: _above(menus[path], floor, kept) for path in sizes}
        curves = {path: _curve(above[path], size) for path, size in sizes.items()}
        held = fill(curves, int(kept * sum(sizes.values())))
        return {path: Fraction(held[path], size) for path, size in sizes.items()}


def _above(offers: Sequence[Offer], floor: Fraction, kept: Fraction) -> list[Offer]:
    """The offers from the floor on, or, if those exceed the uniform share, from the last below."""
    shares = [offer.share for offer in offers]
    least = min((share for share in shares if floor <= share <= kept), default=None)
    if least is None:
        least = max((share for share in shares if share <= kept), default=min(shares))
    return [offer for offer in offers if offer.share >= least]


def _curve(offers: Sequence[Offer], size: int) -> Curve:
    """The offers that lose less than every smaller one, sizes ascending."""
    best: list[tuple[int, float]] = []
    for share, loss in sorted(offers):
        if not best or loss < best[-1][1]:
            best.append((int(share * size), loss))
    return best
