"""Scatter latents of new tokens to their slots in the paged cache."""

import torch

from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import compiled, reference
from vllm_svd.kernels.products import project


def prepare(device: torch.device) -> None:
    """What the first call on a CPU would wait for: compile."""
    if device.type == "cpu":
        compiled.warm_up()


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """key [tokens, groups, k_rank], value [.., v_rank] to cache [blocks, groups, size, width].

    A slot is block * size + offset; negative slots are padding and leave the cache alone. With
    `down` (bases [groups, rank, g * d] of both) key and value are [tokens, groups * g, d], and
    projected first.
    """
    if compiled.store(key, value, kv_cache, slot_mapping, layout, down):
        return
    if down is not None:
        key, value = project(key, down[0]), project(value, down[1])
    if kv_cache.is_cuda:
        from vllm_svd.kernels.latent_store import triton

        triton.store(key, value, kv_cache, slot_mapping, layout)
    else:
        reference.store(key, value, kv_cache, slot_mapping, layout)
