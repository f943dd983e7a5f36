"""Defines latent_store; also its CPU path where numba is missing."""

import torch

from vllm_svd.kernels.latent_layout import LatentLayout


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
) -> None:
    """See vllm_svd.kernels.latent_store."""
    tokens = slot_mapping.shape[0]
    slots = layout.write(key[:tokens], value[:tokens])
    real = slot_mapping >= 0
    if not real.all():
        slots, slot_mapping = slots[real], slot_mapping[real]
    size = kv_cache.shape[2]
    kv_cache[slot_mapping // size, :, slot_mapping % size] = slots.to(kv_cache.dtype)
