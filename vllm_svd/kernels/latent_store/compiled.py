"""latent_store on a CPU in machine code, for few tokens with the projection before it.

In torch the many small operations of the codec would cost a decode step more than attention does,
and those of the projections of one token more than its arithmetic.
"""

import functools
import struct
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_svd import codec
from vllm_svd.format import STORES
from vllm_svd.kernels import native
from vllm_svd.kernels.kept import Source
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.native import KINDS, lines
from vllm_svd.kernels.products import project

# Arguments of the machine code: of a step, which begin with counters of threads and items, and of
# a layer with the scratch of a thread.
_STEP = """
threads begun tokens slots key value scratch
"""
_LAYER = """
kind key_stride_0 key_stride_1 value_stride_0 value_stride_1
cache cache_kind cache_item cache_stride_0 cache_stride_1 cache_stride_2 block_size groups
k_rank v_rank width k_down v_down down_kind down_item
k_runs k_num_runs v_runs v_num_runs bounds scales largest tried
scratch_stride s_latent s_row s_spare
"""
STEP, LAYER = (tuple(names.split()) for names in (_STEP, _LAYER))
FIELDS = (*STEP, *LAYER)
_pack_step = struct.Struct(f"{len(STEP)}q").pack
Down = tuple[torch.Tensor, torch.Tensor]
# Multiplications of a step's projections up to which operators cost more than BLAS gains.
FEW_PRODUCTS = 1 << 20
# Channels of latents below which a second thread costs more than it takes over.
FEW_CHANNELS = 1 << 10


def warm_up() -> None:
    """Compile or load now, so that no request waits for it; nothing where numba is missing."""
    if native.is_there():
        _machine_code()


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
    down: Down | None = None,
) -> bool:
    """See vllm_svd.kernels.latent_store; bytes of tiers are those of the codec.

    False, and nothing written, on a GPU, without numba, or where a dtype is not known.

    A step of one request does this for every layer, with caches full of weights: each function
    that is new to them costs microseconds.
    """
    tokens = slot_mapping.numel()
    if down is not None and tokens * (down[0].numel() + down[1].numel()) > FEW_PRODUCTS:
        if not native.is_there():
            return False
        key, value, down = project(key, down[0]), project(value, down[1]), None
    place = key.dtype, key.stride(), value.dtype, value.stride()
    layer: Layer | None = layout.memo.get("store")
    if (
        layer is None
        or layer.place != place
        or layer.cache() is not kv_cache
        or not layer.down.holds(*(down or (None, None)))
    ):
        if not usable(key, value, kv_cache, down):
            return False
        layer = layout.memo["store"] = _layer(place, key, value, kv_cache, layout, down)
    slots = slot_mapping if slot_mapping.dtype == torch.int64 else slot_mapping.long()
    threads = 1 if tokens * layer.channels <= FEW_CHANNELS else torch.get_num_threads()
    scratch = native.scratch(threads * layer.of_thread)
    step = _pack_step(0, 0, tokens, slots.data_ptr(), key.data_ptr(), value.data_ptr(), scratch)
    native.run(layer.code, step + layer.packed, threads)
    return True


def usable(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    down: Down | None,
) -> bool:
    """Whether a CPU with numba knows these dtypes, those of keys and values equal."""
    if kv_cache.is_cuda:
        return False
    pairs = [(key, value)] if down is None else [(key, value), down]
    known = all(one.dtype == other.dtype and one.dtype in KINDS for one, other in pairs)
    stored = kv_cache.dtype in KINDS or kv_cache.dtype == torch.uint8
    return known and stored and native.is_there()


class Layer(NamedTuple):
    """What stays from step to step, as long as these tensors are the layer's."""

    place: tuple[Any, ...]
    cache: Callable[[], torch.Tensor | None]
    down: Source
    code: Any
    packed: bytes
    channels: int
    of_thread: int


def _layer(
    place: tuple[Any, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: LatentLayout,
    down: Down | None,
) -> Layer:
    """Pack the arguments LAYER."""
    bases = {} if down is None else {"k_down": down[0], "v_down": down[1]}
    if kv_cache.stride(-1) != 1 or not all(basis.is_contiguous() for basis in bases.values()):
        raise ValueError("latent_store on a CPU needs contiguous bases and slots")
    _, groups, block_size, _ = kv_cache.shape
    item, shared = key.element_size(), key.shape[1] // groups
    if any(x.stride(2) != 1 or (shared > 1 and x.stride(1) != x.shape[2]) for x in (key, value)):
        raise ValueError("latent_store on a CPU needs the heads of a group one after the other")
    longest, width = max(layout.k_rank, layout.v_rank), 0 if down is None else down[0].shape[2]
    s_row = lines(4 * longest)
    s_spare = s_row + lines(4 * width)
    end = s_spare + lines(4 * max(longest, 4 * width))
    arguments = {
        **{"key_stride_0": key.stride(0) * item, "value_stride_0": value.stride(0) * item},
        "key_stride_1": key.stride(1) * item * shared,
        "value_stride_1": value.stride(1) * item * shared,
        **native.strided("cache", kv_cache),
        **{"kind": KINDS[key.dtype], "block_size": block_size, "groups": groups},
        **{"k_rank": layout.k_rank, "v_rank": layout.v_rank, "width": width},
        **{"scratch_stride": end, "s_latent": 0, "s_row": s_row, "s_spare": s_spare},
        **{name: basis.data_ptr() for name, basis in bases.items()},
    }
    if down is not None:
        arguments |= native.strided("down", down[0])
    if layout.quantised:
        keys, values = layout.run_numbers
        arguments |= {
            **{"k_runs": keys.ctypes.data, "k_num_runs": len(keys)},
            **{"v_runs": values.ctypes.data, "v_num_runs": len(values)},
            **{name: table.ctypes.data for name, table in _tables().items()},
        }
    return Layer(
        place=place,
        cache=weakref.ref(kv_cache),
        down=Source(*(down or (None, None))),
        code=_machine_code(),
        packed=native.packed(LAYER, arguments),
        channels=groups * (layout.k_rank + layout.v_rank),
        of_thread=end,
    )


@functools.cache
def _tables() -> dict[str, Any]:
    return {
        "bounds": codec.bounds().numpy(),
        "scales": codec.scales().numpy(),
        "largest": np.array([codec.LARGEST[store] for store in STORES], dtype=np.float32),
        "tried": np.array([codec.TRIED[store] for store in STORES], dtype=np.int64),
    }


@functools.cache
def _machine_code() -> Any:
    from vllm_svd.kernels.latent_store import native_store

    return native.c_function(native_store.store)
