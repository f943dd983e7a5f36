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

SHIFT = tl.constexpr(6)  # its place in what kernels get of a part

# How the codes of a part are read; KINDS[store] is its row in bounds().
PLAIN = tl.constexpr(-1)
FP8_E4M3 = tl.constexpr(STORES.index("fp8_e4m3"))
INT8 = tl.constexpr(STORES.index("int8"))
INT4 = tl.constexpr(STORES.index("int4"))
INT2 = tl.constexpr(STORES.index("int2"))
KINDS: dict[Store, int] = {store: kind for kind, store in enumerate(STORES)}

# First channel, channels, the same padded, whether they are read as words, byte of the first code,
# byte of the scale, kind, and by how many bits codes are shifted: zero where a tier begins. Kernels
# get all but the first; K_SLICES and V_SLICES, of what the parts meet, are the first four.
Part = tuple[int, int, int, bool, int, int, int, int]


def padded(size: int, least: int = MIN_SIDE) -> int:
    """The side of a tile that holds `size` entries."""
    return max(least, int(triton.next_power_of_2(size)))


def parts_of(layout: LatentLayout, dtype: torch.dtype) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of a slot that hold the key, then those that hold the value, read in `dtype`."""
    if not layout.quantised:
        k_rank, v_rank = layout.k_rank, layout.v_rank
        return (
            ((0, k_rank, padded(k_rank), False, 0, 0, PLAIN.value, 0),),
            ((0, v_rank, padded(v_rank), False, k_rank, 0, PLAIN.value, 0),),
        )
    keys, values = layout.runs
    return _parts(keys, dtype.itemsize), _parts(values, dtype.itemsize)


def _parts(runs: Sequence[Run], item: int) -> tuple[Part, ...]:
    parts: list[Part] = []
    for run in runs:
        size, bits = run.tier.code_bytes, run.tier.bits
        words = item == 2 and run.tier.store != "fp8_e4m3"
        for i in range(run.tier.channels // size):
            first, kind = run.channel + i * size, KINDS[run.tier.store]
            where = run.codes, run.scale, kind, i * bits
            parts.append((first, size, padded(size), words, *where))
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
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,  # noqa: ARG001
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Values of codes [slots, PADDED], exact in every dtype; of unused slots they are finite.

    Read as words, channels are in the order of channels_of, and scales that share the last word
    are some number of a channel beyond CHANNELS, which nothing but zeros meets.
    """
    if WORDS:
        word = tl.arange(0, PADDED // 4)
        words = tl.load(
            (slot + CODES).to(tl.pointer_type(tl.int32))[:, None] + word[None, :],
            mask=used[:, None] & (word * 4 < CHANNELS)[None, :],
            other=0,
        )
        if KIND == INT8:
            values = _integers_of_words(words, PADDED, dtype)
        elif KIND == INT4:
            values = _small_of_words(words, PADDED, SHIFT, 15, dtype) - 23.5
        else:
            values = _small_of_words(words, PADDED, SHIFT, 3, dtype) - 17.5
    else:
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
            values = _small(codes, SHIFT, 15) - 23.5
        else:
            values = _small(codes, SHIFT, 3) - 17.5
    return values


@triton.jit
def _small(codes, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Sixteen and a code of few bits, as the mantissa's: GPUs convert integers at a low rate.

    In fp32, which alone is not read as words.
    """
    bits = (((codes.to(tl.int32) >> SHIFT) & MASK) << 19) | 0x41800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def channels_of(PADDED: tl.constexpr, WORDS: tl.constexpr):
    """The channels of a part in the order of their values: of a word's four the middle ones turn.

    Two 16-bit values lie in a register, and two bytes that are two apart get there by one shift.
    """
    channel = tl.arange(0, PADDED)
    if WORDS:
        channel = (channel & -4) | ((channel & 1) << 1) | ((channel >> 1) & 1)
    return channel


@triton.jit
def _small_of_words(
    words, PADDED: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr, dtype: tl.constexpr
):
    """As _small, in half precision, of words [slots, PADDED // 4]: two codes of a word at once."""
    even = _halves(words, SHIFT, MASK, dtype)
    odd = _halves(words, SHIFT + 8, MASK, dtype)
    return _values(even, odd, PADDED, dtype)


@triton.jit
def _integers_of_words(words, PADDED: tl.constexpr, dtype: tl.constexpr):
    """The signed bytes of words [slots, PADDED // 4], without a conversion."""
    if dtype == tl.bfloat16:
        sevens, signs = _sevens_and_signs(words, PADDED)
        values = sevens - signs
    else:  # 1,024 and 128 and the integer
        even, odd = words ^ 0x00800080, (words >> 8) ^ 0x00800080
        values = _values(_beside(even, 255, 0x6400), _beside(odd, 255, 0x6400), PADDED, dtype)
        values -= 1152.0
    return values


@triton.jit
def _sevens_and_signs(words, PADDED: tl.constexpr):
    """In bf16, which has eight digits: 128 and a byte's low seven bits; 128, or 256 of its sign."""
    odd = words >> 8
    sevens = _values(_beside(words, 127, 0x4300), _beside(odd, 127, 0x4300), PADDED, tl.bfloat16)
    signs = _values(_beside(words, 128, 0x4300), _beside(odd, 128, 0x4300), PADDED, tl.bfloat16)
    return sevens, signs


@triton.jit
def _values(even, odd, PADDED: tl.constexpr, dtype: tl.constexpr):
    """Halves of words [slots, PADDED // 4] that hold bytes 0 and 2, or 1 and 3, of their word."""
    low = tl.join(even.to(tl.int16), odd.to(tl.int16))
    high = tl.join((even >> 16).to(tl.int16), (odd >> 16).to(tl.int16))
    return tl.join(low, high).reshape(even.shape[0], PADDED).to(dtype, bitcast=True)


@triton.jit
def _beside(words, MASK: tl.constexpr, NUMBER: tl.constexpr):
    """The bits of MASK of each half of a word, in the mantissa of a number."""
    return (words & (MASK * 0x10001)) | (NUMBER * 0x10001)


@triton.jit
def _halves(words, SHIFT: tl.constexpr, MASK: tl.constexpr, dtype: tl.constexpr):
    """Sixteen and a code in each half of a word: of the codes at bits SHIFT and SHIFT + 16."""
    # Of a code in the mantissa of 16 to 31.
    place: tl.constexpr = 3 if dtype == tl.bfloat16 else 6
    sixteen: tl.constexpr = 0x4180 if dtype == tl.bfloat16 else 0x4C00
    moved = words << (place - SHIFT) if place > SHIFT else words >> (SHIFT - place)
    return _beside(moved, MASK << place, sixteen)


@triton.jit
def load_scale(
    slot,
    used,
    scales_ptr,
    CHANNELS: tl.constexpr,  # noqa: ARG001
    PADDED: tl.constexpr,  # noqa: ARG001
    WORDS: tl.constexpr,  # noqa: ARG001
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
