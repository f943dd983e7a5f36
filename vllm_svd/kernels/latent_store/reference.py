"""Defines latent_store; also its CPU path, since it is one indexed write."""

import torch


def store(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See vllm_svd.kernels.latent_store."""
    tokens = slot_mapping.shape[0]
    latents = torch.cat((key[:tokens], value[:tokens]), dim=-1)
    real = slot_mapping >= 0
    if not real.all():
        latents, slot_mapping = latents[real], slot_mapping[real]
    size = kv_cache.shape[2]
    kv_cache[slot_mapping // size, :, slot_mapping % size] = latents.to(kv_cache.dtype)
