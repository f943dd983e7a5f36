"""The projection of every attention layer under a K/V budget."""

from offline_compress.allocation.kv_budget import KVBudget
from offline_compress.allocation.plan import CachePlan
from vllm_svd.format import KVProjection


def plan_caches(
    attention_paths: list[str], num_kv_heads: int, head_dim: int, budget: KVBudget
) -> dict[str, CachePlan]:
    """The projection of each attention layer, in order, under the budget and its overrides."""
    return {
        path: _plan_cache(index, num_kv_heads, head_dim, budget)
        for index, path in enumerate(attention_paths)
    }


def _plan_cache(index: int, heads: int, head_dim: int, budget: KVBudget) -> CachePlan:
    override = budget.layers.get(index)
    ranks = budget.ranks(index, head_dim)
    if ranks is None:
        return CachePlan(num_kv_heads=heads, head_dim=head_dim, reason="kv.kept is null")
    chosen = override is not None and (override.k_rank or override.v_rank)
    if ranks == (budget.group * head_dim,) * 2 and not chosen:
        return CachePlan(
            num_kv_heads=heads, head_dim=head_dim, reason="a projection of full rank saves nothing"
        )
    projection = KVProjection(
        mode=budget.mode_of(index),
        num_kv_heads=heads,
        head_dim=head_dim,
        k_rank=ranks[0],
        v_rank=ranks[1],
        group=budget.group,
    )
    return CachePlan(num_kv_heads=heads, head_dim=head_dim, projection=projection)
