"""Rank allocation: from a budget and the shapes of a model to a RankPlan."""

from offline_compress.allocation.kv_budget import Kept, KVBudget, LayerOverride
from offline_compress.allocation.plan import CachePlan, MatrixPlan, RankPlan, Totals
from offline_compress.allocation.uniform import plan_caches, plan_matrices, plan_matrix, rank_at

__all__ = [
    "CachePlan",
    "KVBudget",
    "Kept",
    "LayerOverride",
    "MatrixPlan",
    "RankPlan",
    "Totals",
    "plan_caches",
    "plan_matrices",
    "plan_matrix",
    "rank_at",
]
