"""Scatter latents of new tokens to their slots in the paged cache."""

import torch

from vllm_svd.kernels.latent_attention import native
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import compiled, reference


def prepare(device: torch.device, layout: LatentLayout) -> None:
    """What the first call on a CPU would wait for: compile the store of tiers, where there are."""
    if device.type == "cpu" and layout.quantised and native.is_there():
        compiled.warm_up()


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
) -> None:
    """key [tokens, groups, k_rank], value [.., v_rank] to cache [blocks, groups, size, width].

    A slot is block * size + offset; negative slots are padding and leave the cache alone.
    """
    if kv_cache.is_cuda:
        from vllm_svd.kernels.latent_store import triton

        triton.store(key, value, kv_cache, slot_mapping, layout)
    elif layout.quantised and native.is_there():
        compiled.store(key, value, kv_cache, slot_mapping, layout)
    else:
        reference.store(key, value, kv_cache, slot_mapping, layout)
