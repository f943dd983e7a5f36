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

# How the codes of a part are read; KINDS[store] is its row in bounds().
PLAIN = tl.constexpr(-1)
FP8_E4M3 = tl.constexpr(STORES.index("fp8_e4m3"))
INT8 = tl.constexpr(STORES.index("int8"))
INT4 = tl.constexpr(STORES.index("int4"))
INT2 = tl.constexpr(STORES.index("int2"))
KINDS: dict[Store, int] = {store: kind for kind, store in enumerate(STORES)}

# first channel, channels, the same padded, byte of the first code, byte of the scale, kind, shift
Part = tuple[int, int, int, int, int, int, int]


def padded(size: int, least: int = MIN_SIDE) -> int:
    """The side of a tile that holds `size` entries."""
    return max(least, int(triton.next_power_of_2(size)))


def parts_of(layout: LatentLayout, rows: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of a slot that hold the key, then those that hold the value.

    `rows` of weights are multiplied with the latter. One product with a result no wider than high
    would make Triton 3 share out the rows of every product among the warps, the same ones to
    several: value parts are padded beyond that.
    """
    if not layout.quantised:
        k_rank, v_rank = layout.k_rank, layout.v_rank
        return (
            ((0, k_rank, padded(k_rank), 0, 0, PLAIN.value, 0),),
            ((0, v_rank, padded(v_rank), k_rank, 0, PLAIN.value, 0),),
        )
    keys, values = layout.runs
    return _parts(keys), _parts(values, 2 * rows)


def _parts(runs: Sequence[Run], least: int = MIN_SIDE) -> tuple[Part, ...]:
    parts: list[Part] = []
    for run in runs:
        size = run.tier.code_bytes
        for i in range(run.tier.channels // size):
            first, kind = run.channel + i * size, KINDS[run.tier.store]
            shift = i * run.tier.bits
            parts.append((first, size, padded(size, least), run.codes, run.scale, kind, shift))
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
def load_part(
    slot,
    used,
    scales_ptr,
    dtype: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Values of codes [slots, PADDED], exact in every dtype, and their scales [slots] in fp32.

    What is read of unused slots and padding is finite.
    """
    channel = tl.arange(0, PADDED)
    codes = tl.load(
        slot[:, None] + CODES + channel[None, :],
        mask=used[:, None] & (channel < CHANNELS)[None, :],
        other=0,
    )
    if KIND == PLAIN:
        values = codes
        scale = tl.full(slot.shape, 1.0, tl.float32)
    else:
        byte = tl.load(slot + SCALE, mask=used, other=0)
        scale = tl.load(scales_ptr + byte.to(tl.int32))
        if KIND == FP8_E4M3:
            # fp16 has the same fields one bit wider each, and a bias greater by 8; not every GPU
            # can convert. NaN, which is not handled, is stored only beside a scale of NaN.
            wide = codes.to(tl.int32)
            bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
            values = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            values = values.to(dtype)
        elif KIND == INT8:
            values = codes.to(tl.int8, bitcast=True).to(dtype)
        elif KIND == INT4:
            values = ((codes >> SHIFT) & 15).to(dtype) - 7.5
        else:
            values = ((codes >> SHIFT) & 3).to(dtype) - 1.5
    return values, scale
