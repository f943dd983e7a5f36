"""Exact budgets: the sizes a matrix can have, and the shares that use up what is kept.

A matrix [m, n] takes a multiple of the bytes of `rank_multiple` ranks, fewer than dense, or stays
dense. Sizes are in quarters of a dense parameter, of which every artefact takes a whole number,
with weights of 16 and of 32 bits.
"""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from offline_compress.allocation.allocator import Allocator, Evidence, Matrix, Shares

Parameters = dict[str, int]
UNITS = 4  # in a dense parameter


class Sizes(NamedTuple):
    """The multiples of `step` below `dense`, and `dense`."""

    step: int
    dense: int

    @property
    def smallest(self) -> int:
        return min(self.step, self.dense)

    def within(self, share: Fraction) -> int:
        """The largest size of at most this share, or the smallest there is."""
        if share >= 1:
            return self.dense
        return max(self.smallest, math.floor(share * self.dense) // self.step * self.step)

    def after(self, held: int) -> int:
        """The next larger size."""
        return min(held + self.step, self.dense)

    def share(self, held: int) -> Fraction:
        return Fraction(held, self.dense)


class Budget:
    """What all matrices may hold together, in quarters of a parameter."""

    def __init__(
        self, kept: Fraction, matrices: Mapping[str, Matrix], rank_multiple: int = 1
    ) -> None:
        self.sizes = {
            path: Sizes(
                math.ceil(rank_multiple * UNITS * matrix.share_of(1) * matrix.size),
                UNITS * matrix.size,
            )
            for path, matrix in matrices.items()
        }
        self.parameters = math.floor(kept * sum(sizes.dense for sizes in self.sizes.values()))

    @property
    def feasible(self) -> bool:
        """Whether it holds every matrix at its smallest."""
        return sum(sizes.smallest for sizes in self.sizes.values()) <= self.parameters

    def shares(self, held: Parameters) -> Shares:
        return {path: sizes.share(held[path]) for path, sizes in self.sizes.items()}

    def within(self, targets: Shares) -> Parameters:
        """Every target rounded down to a size; all shrink alike, in 64ths, where that is too much.

        Targets within the budget can be too much since no matrix is below its smallest size; that
        all are there must be feasible.
        """

        def shrunk(parts: int) -> Parameters:
            return {
                path: sizes.within(targets[path] * parts / 64) for path, sizes in self.sizes.items()
            }

        fitting = bisect_right(
            range(65), self.parameters, key=lambda parts: sum(shrunk(parts).values())
        )
        return shrunk(fitting - 1)

    def spend(self, held: Parameters, targets: Shares) -> Parameters:
        """The rest, step by step to the matrix furthest below its target, until no step fits."""
        held = dict(held)
        rest = self.parameters - sum(held.values())
        queue = [
            (sizes.share(held[path]) - targets[path], index, path)
            for index, (path, sizes) in enumerate(self.sizes.items())
            if held[path] < sizes.dense
        ]
        heapify(queue)
        while queue:
            _, index, path = heappop(queue)
            sizes = self.sizes[path]
            larger = sizes.after(held[path])
            if larger - held[path] > rest:
                continue
            rest -= larger - held[path]
            held[path] = larger
            if larger < sizes.dense:
                heappush(queue, (sizes.share(larger) - targets[path], index, path))
        return held


class BudgetedAllocator(Allocator):
    """Shares of whole ranks: they leave less of the budget than any further step would take.

    A budget that cannot hold every matrix at its smallest is split uniformly.
    """

    @abstractmethod
    def held(self, kept: Fraction, budget: Budget, evidence: Evidence) -> Parameters:
        """The size of every matrix under a feasible budget that cannot hold all of them dense."""

    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        budget = Budget(kept, evidence.matrices, evidence.rank_multiple)
        if kept >= 1 or not budget.feasible:
            return dict.fromkeys(evidence.matrices, kept)
        return budget.shares(self.held(kept, budget, evidence))
