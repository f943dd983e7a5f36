"""latent_store of tiers on a CPU, in machine code: in torch the many small operations of the codec
would cost a decode step more than attention does.

numba compiles it at the first call, in seconds, for this process alone.
"""

import functools
from typing import Any

import numpy as np
import torch

from vllm_svd import codec
from vllm_svd.format import STORES
from vllm_svd.kernels.latent_layout import LatentLayout


def warm_up() -> None:
    """Compile now."""
    _machine_code()


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
) -> None:
    """See vllm_svd.kernels.latent_store; bytes are those of the codec."""
    tokens = slot_mapping.shape[0]
    bounds, scales, largest, tried = _tables()
    slots, cache = slot_mapping.to(torch.int64).numpy(), kv_cache.numpy()
    for latent, runs in zip((key, value), layout.run_numbers, strict=True):
        rows = latent[:tokens].float().contiguous().numpy()
        _machine_code()(rows, slots, cache, runs, bounds, scales, largest, tried)


@functools.cache
def _tables() -> tuple[Any, Any, Any, Any]:
    bounds = codec.bounds().numpy()
    scales = codec.scales().numpy()
    largest = np.array([codec.LARGEST[store] for store in STORES], dtype=np.float32)
    return bounds, scales, largest, np.array([codec.TRIED[store] for store in STORES])


@functools.cache
def _machine_code() -> Any:
    from vllm_svd.kernels.latent_attention import native
    from vllm_svd.kernels.latent_store import native_codec

    native.keep_namespaces_plain()
    return native_codec.encode
