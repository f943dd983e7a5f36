"""Allocation of SVD-LLM V2: Wang et al., NAACL 2025, arXiv 2503.12340, algorithm 1.

In a group G of matrices of one kind, R_i = |G| R s_i / sum_G s_j is removed of matrix i, with
s_i = 1 / log L_i and L_i = ||W_i X - (W_i X)_r||_F = sqrt(sum_{j>r} sigma_j^2) at the uniform R.

The paper leaves open what holds for L <= 1, where its score has no meaning, and whether L is a sum
or a mean over tokens. Here it is the sum, so that more calibration text brings the scores closer
together; a group where some log L <= 0 is split uniformly, L < e counts as e, and R_i stops at
0.95. What that cuts off, and unequal sizes within a group, are made up by scaling the other R_i.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar, Literal

from offline_compress.allocation.allocator import Asks, Evidence, Shares
from offline_compress.allocation.budget import Budget, BudgetedAllocator, Parameters

_MOST_REMOVED = Fraction(95, 100)


class TruncationLoss(BudgetedAllocator):
    """Within each kind of matrix, more for those whose truncation loses more."""

    paper: ClassVar[str] = "Wang et al., NAACL 2025, arXiv 2503.12340"

    name: Literal["truncation_loss"] = "truncation_loss"

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"spectra"})

    def held(self, kept: Fraction, budget: Budget, evidence: Evidence) -> Parameters:
        assert evidence.spectra is not None
        groups: dict[str, dict[str, float]] = {}
        for path, matrix in evidence.matrices.items():
            uniform = budget.sizes[path].within(kept)
            rank = uniform // (budget.sizes[path].step // evidence.rank_multiple)
            lost = (
                0.0
                if uniform == budget.sizes[path].dense
                else float(evidence.spectra[path][rank:].sum())
            )
            groups.setdefault(matrix.kind, {})[path] = math.sqrt(lost)
        targets: Shares = {}
        for losses in groups.values():
            sizes = {path: evidence.matrices[path].size for path in losses}
            removed = removed_shares(1 - kept, sizes, losses)
            targets |= {path: 1 - share for path, share in removed.items()}
        return budget.spend(budget.within(targets), targets)


def removed_shares(
    removed: Fraction, sizes: Mapping[str, int], losses: Mapping[str, float]
) -> Shares:
    """R_i of one group, whose mean by size is `removed` (R); `losses` are the L_i."""
    if removed > _MOST_REMOVED or min(losses.values()) <= 1:
        return dict.fromkeys(losses, removed)
    scores = {path: Fraction(1 / max(math.log(loss), 1.0)) for path, loss in losses.items()}
    capped: set[str] = set()
    while True:
        free = [path for path in scores if path not in capped]
        left = removed * sum(sizes.values()) - _MOST_REMOVED * sum(sizes[path] for path in capped)
        factor = left / sum(sizes[path] * scores[path] for path in free)
        over = {path for path in free if factor * scores[path] > _MOST_REMOVED}
        if not over:
            return {
                path: _MOST_REMOVED if path in capped else factor * score
                for path, score in scores.items()
            }
        capped |= over
