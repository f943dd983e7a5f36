"""The projection of every attention layer under a K/V budget."""

import torch

from offline_compress.allocation.cache_allocator import CacheEvidence, spread
from offline_compress.allocation.cache_menu import Latent
from offline_compress.allocation.kv_budget import KVBudget
from offline_compress.allocation.plan import CachePlan
from vllm_svd.format import KVProjection, Mode, Tier

# Before anything is measured: energies of keys and values fall by half about this often.
_HALVINGS = 12
# Of the dense cache, in the model's dtype; half of it in fewer bits.
_PROBED = 1 / 8


def plan_caches(
    attention_paths: list[str],
    num_kv_heads: int,
    head_dim: int,
    budget: KVBudget,
    item_bytes: int,
    evidence: CacheEvidence | None = None,
) -> dict[str, CachePlan]:
    """The projection of each attention layer, in order, under the budget and its overrides.

    Without `evidence` a budget that measures is planned on one geometric spectrum for all.
    """
    layers = len(attention_paths)
    if not budget.measures:
        latents = [_fixed(index, head_dim, budget, item_bytes) for index in range(layers)]
    else:
        channels = budget.group * head_dim
        spectrum = torch.logspace(0, -_HALVINGS, channels, 2, dtype=torch.float64)[None]
        guess = CacheEvidence([(spectrum, spectrum)] * layers)
        latents = list(
            spread(evidence or guess, budget, budget.sizes(head_dim, item_bytes), item_bytes)
        )
    return {
        path: _planned(index, num_kv_heads, head_dim, budget, latents[index])
        for index, path in enumerate(attention_paths)
    }


def probe_of(
    energies: tuple[torch.Tensor, torch.Tensor],
    budget: KVBudget,
    mode: Mode,
    num_kv_heads: int,
    head_dim: int,
    item_bytes: int,
) -> KVProjection:
    """A layer at a small size: its KL must stand out of what rounding does to logits."""
    share = _PROBED if budget.store == "model" else _PROBED / 2
    size = share * budget.group * head_dim * item_bytes
    key, value = spread(
        CacheEvidence([energies]),
        budget.model_copy(update={"allocator": "uniform"}),
        (size, size),
        item_bytes,
    )[0]
    return _projection(mode, num_kv_heads, head_dim, budget.group, key, value)


def _fixed(
    index: int, head_dim: int, budget: KVBudget, item_bytes: int
) -> tuple[Latent, Latent] | None:
    ranks = budget.ranks(index, head_dim, item_bytes)
    if ranks is None:
        return None
    store = budget.store
    if store == "model" or store == "tiers":
        return Latent(ranks[0]), Latent(ranks[1])
    tiers = [(Tier(channels=rank, store=store),) for rank in ranks]
    return Latent(ranks[0], tiers[0]), Latent(ranks[1], tiers[1])


def _planned(
    index: int, heads: int, head_dim: int, budget: KVBudget, latents: tuple[Latent, Latent] | None
) -> CachePlan:
    if latents is None:
        return CachePlan(num_kv_heads=heads, head_dim=head_dim, reason="kv.kept is null")
    key, value = latents
    override = budget.layers.get(index)
    chosen = override is not None and (override.k_rank or override.v_rank)
    if latents == (Latent(budget.group * head_dim),) * 2 and not chosen:
        return CachePlan(
            num_kv_heads=heads, head_dim=head_dim, reason="a projection of full rank saves nothing"
        )
    projection = _projection(budget.mode_of(index), heads, head_dim, budget.group, key, value)
    return CachePlan(num_kv_heads=heads, head_dim=head_dim, projection=projection)


def _projection(
    mode: Mode, heads: int, head_dim: int, group: int, key: Latent, value: Latent
) -> KVProjection:
    return KVProjection(
        mode=mode,
        num_kv_heads=heads,
        head_dim=head_dim,
        k_rank=key.rank,
        v_rank=value.rank,
        group=group,
        k_tiers=key.tiers,
        v_tiers=value.tiers,
    )
