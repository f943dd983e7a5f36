"""Pairs of channels in bf16, as CPUs with AVX512-BF16 multiply them: two products for one.

Codes of few bits are exact in bf16, so that pairs of them lose nothing to floats. A word of the
codes of a tier, four bytes, becomes pairs of channels: those of its first two bytes and of its last
two where a code is a byte, else for each place in a byte the first with the third and the second
with the fourth. Of half a word, which may be the last, the first byte goes with the second.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.codec import FP8, INT4, INT8, fp8_bits
from vllm_svd.kernels.native.features import has
from vllm_svd.kernels.native.memory import INTEGERS, VECTOR, all_lanes, called, compiled, ints

THERE = has("avx512bf16", "avx512bw")


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's type, of which llvmlite has none."""

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()
_PAIRS, _SHORTS = ir.VectorType(_BFloat(), 2 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)


def add_products(builder, total, left, right):
    """total + the products of both channels, whose pairs are words."""
    pairs = [builder.bitcast(words, _PAIRS) for words in (left, right)]
    return called(builder, "avx512bf16.dpbf16ps", VECTOR, total, *pairs)


def _looked_up(builder, table, places):
    """Of 16 bits each the low ones tell which of a table that repeats itself."""
    places = builder.bitcast(places, _SHORTS)
    found = called(builder, "avx512.permvar.hi", _SHORTS, table, places)
    return builder.bitcast(found, INTEGERS)


def _bfloat(value):
    """Bits of a multiple of a half that bf16 has, which is below 16."""
    if value == 0:
        return 0
    size, exponent = abs(value), 127
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    return (value < 0) << 15 | exponent << 7 | round((size - 1) * 128)


def _of_bytes(fp8):
    """Pairs of a word of four codes: the first two, and the last two."""

    @intrinsic
    def pairs(typingctx, words, first, second):
        def generate(context, builder, signature, arguments):
            words, *targets = (
                builder.inttoptr(place, INTEGERS.as_pointer()) for place in arguments
            )
            codes, bits = builder.load(words, align=4), []
            for byte in range(4):
                if fp8:
                    code = builder.and_(builder.lshr(codes, all_lanes(8 * byte)), all_lanes(255))
                    bits.append(fp8_bits(builder, code))
                else:
                    code = builder.shl(codes, all_lanes(24 - 8 * byte))
                    level = builder.sitofp(builder.ashr(code, all_lanes(24)), VECTOR)
                    bits.append(builder.bitcast(level, INTEGERS))
            for low, high, target in zip(bits[::2], bits[1::2], targets, strict=True):
                low = builder.lshr(low, all_lanes(16))
                high = builder.and_(high, all_lanes(-1 << 16))
                builder.store(builder.or_(low, high), target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return pairs


def _of_parts(bits, whole):
    """Pairs of a word of codes of so few bits, or of its first half: at `target` and behind it."""
    levels = [code - ((1 << bits) - 1) / 2 for code in range(1 << bits)]
    table = ir.Constant(_SHORTS, [_bfloat(levels[i % len(levels)]) for i in range(2 * LANES)])

    @intrinsic
    def pairs(typingctx, words, target, stride):
        def generate(context, builder, signature, arguments):
            words, target, stride = arguments
            codes = builder.load(builder.inttoptr(words, INTEGERS.as_pointer()), align=4)
            for row, shift in enumerate(range(0, 16 if whole else 8, bits)):
                places = builder.lshr(codes, all_lanes(shift))
                if not whole:  # the second byte, from bit 16 on
                    low = builder.and_(places, all_lanes((1 << 16) - 1))
                    high = builder.shl(codes, all_lanes(8 - shift))
                    places = builder.or_(low, builder.and_(high, all_lanes(-1 << 16)))
                at = builder.add(target, builder.mul(stride, ir.IntType(64)(row)))
                found = _looked_up(builder, table, places)
                builder.store(found, builder.inttoptr(at, INTEGERS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return pairs


_integers, _fp8 = _of_bytes(False), _of_bytes(True)
_nibbles, _half_of_nibbles = _of_parts(4, True), _of_parts(4, False)
_crumbs, _half_of_crumbs = _of_parts(2, True), _of_parts(2, False)


@compiled
def _decode(words, runs, num_runs, target, stride):
    """Pairs [.., LANES], tier after tier, of the codes [words, LANES] of LANES latents.

    Every tier begins with a word, and may end with half of one: see places.in_pairs.
    """
    for run in range(num_runs):
        of = ints(runs + 40 * run)
        kind, read, bits = of[0], words + LANES * of[3], 8
        if kind != INT8 and kind != FP8:
            bits = 4 if kind == INT4 else 2
        left = of[2] * bits // 8  # bytes
        while left > 0:
            if kind == INT8:
                _integers(read, target, target + stride)
            elif kind == FP8:
                _fp8(read, target, target + stride)
            elif kind == INT4 and left > 2:
                _nibbles(read, target, stride)
            elif kind == INT4:
                _half_of_nibbles(read, target, stride)
            elif left > 2:
                _crumbs(read, target, stride)
            else:
                _half_of_crumbs(read, target, stride)
            target += stride * (min(left, 4) * 4 // bits)
            read, left = read + 4 * LANES, left - 4


@compiled
def _nothing(words, runs, num_runs, target, stride):
    """Where there are no such units, nothing of this is even compiled."""


decode_pairs = _decode if THERE else _nothing
