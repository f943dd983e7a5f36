"""Rank allocation: from a budget and the shapes of a model to a RankPlan."""

from offline_compress.allocation.kv_budget import Kept, KVBudget, LayerOverride, Mode
from offline_compress.allocation.plan import (
    CachePlan,
    CalibrationCost,
    MatrixPlan,
    RankPlan,
    Totals,
)
from offline_compress.allocation.uniform import plan_caches, plan_matrices, plan_matrix, rank_at

__all__ = [
    "CachePlan",
    "CalibrationCost",
    "KVBudget",
    "Kept",
    "LayerOverride",
    "MatrixPlan",
    "Mode",
    "RankPlan",
    "Totals",
    "plan_caches",
    "plan_matrices",
    "plan_matrix",
    "rank_at",
]
