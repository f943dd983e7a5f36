"""STRS of ASVD: Yuan et al., arXiv 2312.05821: sensitivity-based truncation rank search.

Every matrix is truncated alone at every share of a grid and the calibration loss measured. Of all
(matrix, share, loss), sorted by loss, those above a cut are given up; each matrix takes the
smallest share that is left, or stays dense. A binary search finds the lowest cut within budget.

What one more tuple would cost and the budget does not hold is spent towards it, rank by rank.
Where grid times matrices exceed `max_evaluations`, fewer shares of the grid are measured, the
others lie between them; where even one share is too many, matrices of one kind in neighbouring
layers are truncated together and divide the increase. No matrix and no share is left out.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from offline_compress.allocation.allocator import LOSS_WINDOWS, Asks, Evidence
from offline_compress.allocation.budget import Budget, BudgetedAllocator, Parameters

Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]

_TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Strs(BudgetedAllocator):
    """Measured, not predicted: at most `max_evaluations` runs over the calibration text.

    One of them is the dense model; matrices by `grid` shares would be the rest.
    """

    paper: ClassVar[str] = "Yuan et al., arXiv 2312.05821"

    name: Literal["strs"] = "strs"
    grid: Annotated[tuple[Share, ...], Field(min_length=1)] = _TENTHS
    max_evaluations: Annotated[int, Field(ge=2)] = 500

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"losses"})

    def windows_read(self, matrices: int) -> int:
        return LOSS_WINDOWS * min(self.max_evaluations, 1 + matrices * len(self.grid))

    def held(self, kept: Fraction, budget: Budget, evidence: Evidence) -> Parameters:
        increases = self._increases(kept, budget, evidence)
        cuts = sorted({loss for tuples in increases.values() for loss in tuples.values()})[::-1]

        def left_at(cut: int) -> Parameters:
            """The smallest size of every matrix whose loss is at most that of the cut."""
            harm = cuts[cut] if cut < len(cuts) else -math.inf
            return {
                path: min(
                    (size for size, loss in increases.get(path, {}).items() if loss <= harm),
                    default=sizes.dense,
                )
                for path, sizes in budget.sizes.items()
            }

        # The last cut that fits: -1 where the smallest share of the grid is too much already.
        cut = -1 + bisect_right(
            range(len(cuts) + 1), budget.parameters, key=lambda cut: sum(left_at(cut).values())
        )
        start = budget.within(budget.shares(left_at(max(cut, 0))))
        return budget.spend(start, budget.shares(left_at(cut + 1)))

    def _increases(
        self, kept: Fraction, budget: Budget, evidence: Evidence
    ) -> dict[str, dict[int, float]]:
        """By matrix and size: the nats that the matrix adds to the loss of the dense model."""
        assert evidence.loss is not None
        grid = _most_telling_first({Fraction(str(share)) for share in self.grid}, kept)
        paths = [path for path, sizes in budget.sizes.items() if sizes.smallest < sizes.dense]
        paths.sort(key=lambda path: evidence.matrices[path].kind)
        together = -(-len(paths) // (self.max_evaluations - 1))
        units = [paths[at : at + together] for at in range(0, len(paths), together)]
        measured = grid[: (self.max_evaluations - 1) // len(units)]
        total = 1 + len(units) * len(measured)

        evidence.progress("STRS", 0, total)
        dense = evidence.loss({})
        evidence.progress("STRS", 1, total)
        increases: dict[str, dict[int, float]] = {}
        for number, unit in enumerate(units):
            known: dict[Fraction, float] = {}
            for done, share in enumerate(measured, 2 + number * len(measured)):
                sizes = {path: budget.sizes[path].within(share) for path in unit}
                truncated = {path: budget.sizes[path].share(size) for path, size in sizes.items()}
                increase = (evidence.loss(truncated) - dense) / len(unit)
                known[share] = increase if math.isfinite(increase) else math.inf
                evidence.progress("STRS", done, total)
            for path in unit:
                tuples = increases[path] = {}
                for share in grid:  # the measured ones are first, and stay
                    size = budget.sizes[path].within(share)
                    tuples.setdefault(size, increase_at(share, known))
        return increases


def _most_telling_first(grid: Collection[Fraction], kept: Fraction) -> list[Fraction]:
    """The share next to the target, the smallest, then always the one furthest from all others."""
    left = sorted(grid)
    chosen = list(dict.fromkeys((min(left, key=lambda share: abs(share - kept)), left[0])))
    while len(chosen) < len(left):
        ends = (*chosen, Fraction(1))
        chosen.append(max(left, key=lambda share: min(abs(share - end) for end in ends)))
    return chosen


def increase_at(share: Fraction, known: Mapping[Fraction, float]) -> float:
    """The loss increase at a share, given those measured and none at share 1.

    Geometric between two that are positive, for losses fall about exponentially with the share;
    linear otherwise, and beyond the smallest measured. Never outside the values at both ends.
    """
    if share in known:
        return known[share]
    right = min((end for end in known if end > share), default=Fraction(1))
    left = max((end for end in known if end < share), default=None)
    above = known.get(right, 0.0)
    if left is None:
        return above * float((1 - share) / (1 - right))
    below, part = known[left], float((share - left) / (right - left))
    if below > 0 and above > 0:
        return math.pow(below, 1 - part) * math.pow(above, part)
    return below * (1 - part) + above * part
