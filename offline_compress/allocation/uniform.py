"""Uniform allocation: every matrix, and every cache, keeps the same fraction."""

from collections.abc import Mapping
from fractions import Fraction

from offline_compress.allocation.kv_budget import KVBudget
from offline_compress.allocation.plan import CachePlan, MatrixPlan
from vllm_svd.format import KVProjection


def rank_at(kept: float, out_features: int, in_features: int) -> int:
    """floor(kept m n / (m + n)): the largest rank whose factors hold `kept` of the parameters.

    In decimals, as the user wrote it: 0.29 of 100 is 29, where binary floats give 28.
    """
    share = Fraction(str(kept)) * out_features * in_features / (out_features + in_features)
    return int(share)


def plan_matrix(
    out_features: int, in_features: int, *, kept: float, rank_multiple: int, method: str
) -> MatrixPlan:
    """The rank is rounded down to a multiple, at least one; dense where that saves nothing."""
    shape = {"out_features": out_features, "in_features": in_features}
    if kept == 1:
        return MatrixPlan(**shape, reason="weights.kept is 1")
    rank = rank_at(kept, out_features, in_features)
    rank = max(rank_multiple, rank - rank % rank_multiple)
    factors, dense = rank * (out_features + in_features), out_features * in_features
    if factors >= dense:
        return MatrixPlan(
            **shape, reason=f"factors of rank {rank} hold {factors} parameters, the matrix {dense}"
        )
    return MatrixPlan(**shape, rank=rank, method=method)


def plan_caches(
    attention_paths: list[str], num_kv_heads: int, head_dim: int, budget: KVBudget
) -> dict[str, CachePlan]:
    """The projection of each attention layer, in order, under the budget and its overrides."""
    return {
        path: _plan_cache(index, num_kv_heads, head_dim, budget)
        for index, path in enumerate(attention_paths)
    }


def plan_matrices(
    shapes: Mapping[str, tuple[int, int]], *, kept: float, rank_multiple: int, method: str
) -> dict[str, MatrixPlan]:
    """The same `kept` for every matrix [m, n]."""
    return {
        path: plan_matrix(*shape, kept=kept, rank_multiple=rank_multiple, method=method)
        for path, shape in shapes.items()
    }


def _plan_cache(index: int, heads: int, head_dim: int, budget: KVBudget) -> CachePlan:
    override = budget.layers.get(index)
    ranks = budget.ranks(index, head_dim)
    if ranks is None:
        return CachePlan(num_kv_heads=heads, head_dim=head_dim, reason="kv.kept is null")
    chosen = override is not None and (override.k_rank or override.v_rank)
    if ranks == (head_dim, head_dim) and not chosen:
        return CachePlan(
            num_kv_heads=heads, head_dim=head_dim, reason="a projection of full rank saves nothing"
        )
    projection = KVProjection(
        mode=budget.mode_of(index),
        num_kv_heads=heads,
        head_dim=head_dim,
        k_rank=ranks[0],
        v_rank=ranks[1],
    )
    return CachePlan(num_kv_heads=heads, head_dim=head_dim, projection=projection)
