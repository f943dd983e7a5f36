"""latent_store on CUDA: one program per token and group."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_svd import codec
from vllm_svd.kernels.latent_layout import LatentLayout, Run
from vllm_svd.kernels.latent_tiers_triton import (
    FP8_E4M3,
    INT4,
    INT8,
    KINDS,
    bounds,
    padded,
    scale_table,
)

NOT_FINITE = tl.constexpr(codec.NOT_FINITE)
SCALE_ZERO = tl.constexpr(codec.SCALE_ZERO)


@triton.jit
def _copy(source, target, RANK: tl.constexpr, PADDED: tl.constexpr):
    channel = tl.arange(0, PADDED)
    real = channel < RANK
    tl.store(target + channel, tl.load(source + channel, mask=real), mask=real)


@triton.jit
def _nearest(x, KIND: tl.constexpr):
    """The nearest value of a code of 4 or 2 bits."""
    largest: tl.constexpr = 7.5 if KIND == INT4 else 1.5
    return tl.minimum(tl.maximum(tl.floor(x) + 0.5, -largest), largest)


@triton.jit
def _fp8_bits(x):
    """The nearest e4m3 number, ties to even, in integers: not every GPU can convert."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    # Three bits of mantissa stay, and the bias shrinks from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9; adding 2^23 rounds to an integer.
    steps = magnitude.to(tl.float32, bitcast=True) * 512.0
    subnormal = ((steps + 8388608.0) - 8388608.0).to(tl.int32)
    return tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _codes(x, KIND: tl.constexpr):
    """Codes of values that are divided by their scale, as integers."""
    if KIND == FP8_E4M3:
        codes = _fp8_bits(x)
    elif KIND == INT8:
        clipped = tl.minimum(tl.maximum(x, -127.0), 127.0)
        # Adding 1.5 * 2^23 rounds to an integer, ties to even.
        codes = ((clipped + 12582912.0) - 12582912.0).to(tl.int32) & 255
    elif KIND == INT4:
        codes = (_nearest(x, KIND) + 7.5).to(tl.int32)
    else:
        codes = (_nearest(x, KIND) + 1.5).to(tl.int32)
    return codes


@triton.jit
def _squared_error(x, real, scale, KIND: tl.constexpr):
    missed = tl.where(real, _nearest(tl.div_rn(x, scale), KIND) * scale - x, 0.0)
    return tl.sum(tl.sum(missed * missed, axis=1), axis=0)


@triton.jit
def _encode(
    source,
    target,
    scales_ptr,
    bounds_ptr,
    FIRST: tl.constexpr,
    BYTES: tl.constexpr,
    PADDED: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    TRIED: tl.constexpr,
):
    """Write one tier as codec.encode defines it: a row of x holds the same bits of every byte."""
    part = tl.arange(0, 8 // BITS)[:, None]
    byte = tl.arange(0, PADDED)
    real = (byte < BYTES)[None, :] & (part >= 0)
    x = tl.load(source + FIRST + part * BYTES + byte[None, :], mask=real, other=0.0)
    x = x.to(tl.float32)
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")
    all_finite = tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) > 0
    largest = tl.max(tl.max(tl.where(finite, magnitude, 0.0), axis=1), axis=0)
    bounds = tl.load(bounds_ptr + KIND * 256 + tl.arange(0, 256))
    best = tl.sum((bounds < largest).to(tl.int32), axis=0)
    best = tl.where(all_finite, best, SCALE_ZERO)
    x = tl.where(x == x, x, 0.0)

    scale = tl.load(scales_ptr + best)
    if TRIED > 1:
        unclipped = best
        least = _squared_error(x, real, scale, KIND)
        for lower in tl.static_range(1, TRIED):
            tried = tl.maximum(unclipped - lower, 0)
            error = _squared_error(x, real, tl.load(scales_ptr + tried), KIND)
            best = tl.where(error < least, tried, best)
            least = tl.minimum(error, least)
        scale = tl.load(scales_ptr + best)
    # The bits of the parts are disjoint: their sum is their union.
    packed = tl.sum(_codes(tl.div_rn(x, scale), KIND) << (part * BITS), axis=0)
    tl.store(target + CODES + byte, packed.to(tl.uint8), mask=byte < BYTES)
    tl.store(target + SCALE, tl.where(all_finite, best, NOT_FINITE).to(tl.uint8))


@triton.jit
def _store_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slot_ptr,
    scales_ptr,
    bounds_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    BLOCK_SIZE: tl.constexpr,
    QUANTISED: tl.constexpr,
    K_RANK: tl.constexpr,
    V_RANK: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    K_TIERS: tl.constexpr,
    V_TIERS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    target = (
        cache_ptr
        + (slot // BLOCK_SIZE) * cache_block_stride
        + head * cache_head_stride
        + (slot % BLOCK_SIZE) * cache_slot_stride
    )
    key = key_ptr + token * key_token_stride + head * key_head_stride
    value = value_ptr + token * value_token_stride + head * value_head_stride
    if QUANTISED:
        for i in tl.static_range(len(K_TIERS)):
            _encode(key, target, scales_ptr, bounds_ptr, *K_TIERS[i])
        for i in tl.static_range(len(V_TIERS)):
            _encode(value, target, scales_ptr, bounds_ptr, *V_TIERS[i])
    else:
        _copy(key, target, K_RANK, K_PADDED)
        _copy(value, target + K_RANK, V_RANK, V_PADDED)


def _tiers(runs: Sequence[Run]) -> tuple[tuple[int, ...], ...]:
    """The compile-time arguments of _encode for each tier."""
    return tuple(
        (
            run.channel,
            run.tier.code_bytes,
            padded(run.tier.code_bytes),
            run.codes,
            run.scale,
            KINDS[run.tier.store],
            run.tier.bits,
            codec.TRIED[run.tier.store],
        )
        for run in runs
    )


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
) -> None:
    """See vllm_svd.kernels.latent_store; channels must be contiguous in all three tensors."""
    scales, limits = key, key
    if layout.quantised:
        scales, limits = scale_table(key.device), bounds(key.device)
    k_runs, v_runs = layout.runs
    _store_kernel[(slot_mapping.shape[0], key.shape[1])](
        key,
        value,
        kv_cache,
        slot_mapping,
        scales,
        limits,
        *key.stride()[:2],
        *value.stride()[:2],
        *kv_cache.stride()[:3],
        BLOCK_SIZE=kv_cache.shape[2],
        QUANTISED=layout.quantised,
        K_RANK=layout.k_rank,
        V_RANK=layout.v_rank,
        K_PADDED=triton.next_power_of_2(layout.k_rank),
        V_PADDED=triton.next_power_of_2(layout.v_rank),
        K_TIERS=_tiers(k_runs),
        V_TIERS=_tiers(v_runs),
        # One warp reduces without shared memory.
        num_warps=1 if layout.quantised else 4,
    )
