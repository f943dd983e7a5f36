"""What the Triton kernels share about stored latents: tables, parts of a slot, their values.

A part is a run of channels whose codes lie at the same bits of neighbouring bytes: a tier of 8 bits
is one part, one of 4 bits two, one of 2 bits four. Parts of a tier read the same bytes, and the
compiler loads these once. A latent in the model's dtype is one part, too, with a scale of one.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_svd import codec
from vllm_svd.format import STORES, Store
from vllm_svd.kernels.latent_layout import LatentLayout, Run

MIN_SIDE = 16  # the smallest side of tl.dot

SHIFT = tl.constexpr(5)  # its place in what kernels get of a part

# How the codes of a part are read; KINDS[store] is its row in bounds().
PLAIN = tl.constexpr(-1)
FP8_E4M3 = tl.constexpr(STORES.index("fp8_e4m3"))
INT8 = tl.constexpr(STORES.index("int8"))
INT4 = tl.constexpr(STORES.index("int4"))
INT2 = tl.constexpr(STORES.index("int2"))
KINDS: dict[Store, int] = {store: kind for kind, store in enumerate(STORES)}

# First channel, channels, the same padded, byte of the first code, byte of the scale, kind, and by
# how many bits codes are shifted: zero where a tier begins. Kernels get all but the first.
Part = tuple[int, int, int, int, int, int, int]


def padded(size: int, least: int = MIN_SIDE) -> int:
    """The side of a tile that holds `size` entries."""
    return max(least, int(triton.next_power_of_2(size)))


def parts_of(layout: LatentLayout) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of a slot that hold the key, then those that hold the value."""
    if not layout.quantised:
        k_rank, v_rank = layout.k_rank, layout.v_rank
        return (
            ((0, k_rank, padded(k_rank), 0, 0, PLAIN.value, 0),),
            ((0, v_rank, padded(v_rank), k_rank, 0, PLAIN.value, 0),),
        )
    keys, values = layout.runs
    return _parts(keys), _parts(values)


def _parts(runs: Sequence[Run]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for run in runs:
        size = run.tier.code_bytes
        for i in range(run.tier.channels // size):
            first, kind = run.channel + i * size, KINDS[run.tier.store]
            shift = i * run.tier.bits
            parts.append((first, size, padded(size), run.codes, run.scale, kind, shift))
    return tuple(parts)


# Tables are made once per device, by the first call: a warm-up, before CUDA graphs are captured.
@functools.cache
def scale_table(device: torch.device) -> torch.Tensor:
    """codec.scales() on this device."""
    return codec.scales().to(device)


@functools.cache
def bounds(device: torch.device) -> torch.Tensor:
    """codec.bounds() on this device."""
    return codec.bounds().to(device)


@triton.jit
def load_values(
    slot,
    used,
    dtype: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,  # noqa: ARG001
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Values of codes [slots, PADDED], exact in every dtype; of unused slots they are finite."""
    channel = tl.arange(0, PADDED)
    codes = tl.load(
        slot[:, None] + CODES + channel[None, :],
        mask=used[:, None] & (channel < CHANNELS)[None, :],
        other=0,
    )
    if KIND == PLAIN:
        values = codes
    elif KIND == FP8_E4M3:
        # fp16 has the same fields one bit wider each, and a bias greater by 8; not every GPU
        # can convert. NaN, which is not handled, is stored only beside a scale of NaN.
        wide = codes.to(tl.int32)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        values = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = values.to(dtype)
    elif KIND == INT8:
        values = codes.to(tl.int8, bitcast=True).to(dtype)
    elif KIND == INT4:
        values = _small(codes, SHIFT, 15, dtype) - 23.5
    else:
        values = _small(codes, SHIFT, 3, dtype) - 17.5
    return values


@triton.jit
def _small(codes, SHIFT: tl.constexpr, MASK: tl.constexpr, dtype: tl.constexpr):
    """Sixteen and a code of few bits, as the mantissa's: GPUs convert integers at a low rate."""
    if dtype == tl.float32:
        found = ((((codes.to(tl.int32) >> SHIFT) & MASK) << 19) | 0x41800000).to(
            tl.float32, bitcast=True
        )
    elif dtype == tl.bfloat16:
        found = ((((codes.to(tl.int16) >> SHIFT) & MASK) << 3) | 0x4180).to(
            tl.bfloat16, bitcast=True
        )
    else:
        found = ((((codes.to(tl.int16) >> SHIFT) & MASK) << 6) | 0x4C00).to(
            tl.float16, bitcast=True
        )
    return found


@triton.jit
def load_scale(
    slot,
    used,
    scales_ptr,
    CHANNELS: tl.constexpr,  # noqa: ARG001
    PADDED: tl.constexpr,  # noqa: ARG001
    CODES: tl.constexpr,  # noqa: ARG001
    SCALE: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,  # noqa: ARG001
):
    """The scales [slots] of a part's tier, in fp32."""
    if KIND == PLAIN:
        scale = tl.full(slot.shape, 1.0, tl.float32)
    else:
        byte = tl.load(slot + SCALE, mask=used, other=0)
        scale = tl.load(scales_ptr + byte.to(tl.int32))
    return scale
