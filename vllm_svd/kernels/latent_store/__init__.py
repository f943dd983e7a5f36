"""Scatter latents of new tokens to their slots in the paged cache."""

import torch

from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import reference


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
    else:
        reference.store(key, value, kv_cache, slot_mapping, layout)
