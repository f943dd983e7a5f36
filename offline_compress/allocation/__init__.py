"""Rank allocation: from a budget, shapes and measurements to the share of every matrix.

A new allocator is a file here and a name in `AllocatorConfig`.
"""

from typing import Annotated, get_args

from pydantic import Field

from offline_compress.allocation.allocator import (
    LOSS_WINDOWS,
    Allocator,
    Asks,
    Evidence,
    Gated,
    Matrix,
    Offer,
    Shares,
)
from offline_compress.allocation.block_influence import BlockInfluence
from offline_compress.allocation.cache_allocator import PROBE_WINDOWS, CacheEvidence
from offline_compress.allocation.cache_menu import lost_energy
from offline_compress.allocation.caches import plan_caches, probe_of
from offline_compress.allocation.knapsack import Knapsack
from offline_compress.allocation.kv_budget import Kept, KVBudget, LayerOverride
from offline_compress.allocation.learned import Learned
from offline_compress.allocation.plan import (
    CachePlan,
    CalibrationCost,
    MatrixPlan,
    RankPlan,
    Totals,
)
from offline_compress.allocation.strs import Strs
from offline_compress.allocation.truncation_loss import TruncationLoss
from offline_compress.allocation.uniform import Uniform
from offline_compress.allocation.water_filling import WaterFilling

Allocators = Uniform | Strs | TruncationLoss | WaterFilling | Learned | BlockInfluence | Knapsack
AllocatorConfig = Annotated[Allocators, Field(discriminator="name")]

ALLOCATORS: dict[str, type[Allocator]] = {
    allocator.model_fields["name"].default: allocator for allocator in get_args(Allocators)
}

__all__ = [
    "ALLOCATORS",
    "LOSS_WINDOWS",
    "PROBE_WINDOWS",
    "Allocator",
    "AllocatorConfig",
    "Asks",
    "BlockInfluence",
    "CacheEvidence",
    "CachePlan",
    "CalibrationCost",
    "Evidence",
    "Gated",
    "KVBudget",
    "Kept",
    "Knapsack",
    "LayerOverride",
    "Learned",
    "Matrix",
    "MatrixPlan",
    "Offer",
    "RankPlan",
    "Shares",
    "Strs",
    "Totals",
    "TruncationLoss",
    "Uniform",
    "WaterFilling",
    "lost_energy",
    "plan_caches",
    "probe_of",
]
