"""Codes of a latent's tiers to floats, 16 channels at a time, wherever in a slot they lie.

Needs AVX512-VBMI, which picks any bytes of 64. What to do in each lane is read from tables, so that
channels of several tiers, or of several parts of a byte, are decoded by the same instructions.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.features import has
from vllm_svd.kernels.native.memory import INTEGERS, VECTOR, all_lanes, called, compiled, ints
from vllm_svd.kernels.native.places import SPREAD_ROWS

THERE = has("avx512vbmi", "avx512bw")

_WORD = ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
_OCTETS = ir.VectorType(ir.IntType(8), LANES)


def _scales(builder, bytes_):
    """2^((b - 128) / 8) of bytes, exactly codec.scales(); NaN for 255."""
    eighths = [2.0 ** (i / 8) for i in range(8)] * 2
    steps = builder.and_(bytes_, all_lanes(7))
    part = called(builder, "avx512.permvar.sf", VECTOR, ir.Constant(VECTOR, eighths), steps)
    octaves = builder.sub(builder.lshr(bytes_, all_lanes(3)), all_lanes(16))
    bits = builder.add(builder.bitcast(part, INTEGERS), builder.shl(octaves, all_lanes(23)))
    finite = builder.icmp_signed("!=", bytes_, all_lanes(255))
    return builder.select(finite, builder.bitcast(bits, VECTOR), all_lanes(float("nan")))


def _read(builder, address, kind, align=4):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _write(builder, vector, address):
    builder.store(vector, builder.inttoptr(address, VECTOR.as_pointer()), align=4)


@intrinsic
def _read_scales(typingctx, slot, target):
    """target [LANES] of as many bytes."""

    def generate(context, builder, signature, arguments):
        slot, target = arguments
        _write(
            builder,
            _scales(builder, builder.zext(_read(builder, slot, _OCTETS, 1), INTEGERS)),
            target,
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _decode(typingctx, slots, stride, count, scales, table, target, target_stride):
    """target [count, LANES] of windows of slots, by one table; it stays in registers."""

    def generate(context, builder, signature, arguments):
        slots, stride, count, scales, table, target, target_stride = arguments
        kinds = (_BYTES, INTEGERS, INTEGERS, INTEGERS, VECTOR, INTEGERS)
        rows = [
            _read(builder, builder.add(table, _WORD(64 * i)), kind) for i, kind in enumerate(kinds)
        ]
        bytes_, shift, mask, flip, middle, tier = rows
        with cgutils.for_range(builder, count) as loop:
            window = _read(builder, builder.add(slots, builder.mul(loop.index, stride)), _BYTES, 1)
            codes = called(builder, "avx512.permvar.qi", _BYTES, window, bytes_)
            codes = builder.lshr(builder.bitcast(codes, INTEGERS), shift)
            codes = builder.xor(builder.and_(codes, mask), flip)
            levels = builder.fsub(builder.sitofp(codes, VECTOR), middle)
            found = _read(builder, builder.add(scales, builder.mul(loop.index, _WORD(64))), VECTOR)
            scale = called(builder, "avx512.permvar.sf", VECTOR, found, tier)
            place = builder.add(target, builder.mul(loop.index, target_stride))
            _write(builder, builder.fmul(levels, scale), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@compiled
def _decode_all(slots, stride, count, runs, begins, tables, vectors, target, target_stride, spare):
    """Floats of the latents of `count` slots, as codec.decode, by the tables of native.places.

    `spare` holds `count` vectors.
    """
    bytes_, begin = slots + ints(runs)[4], ints(begins)
    for t in range(count):
        _read_scales(bytes_ + t * stride, spare + 4 * LANES * t)
    for vector in range(vectors):
        at, table = slots + begin[vector], tables + 4 * LANES * SPREAD_ROWS * vector
        out = target + 4 * LANES * vector
        _decode(at, stride, count, spare, table, out, target_stride)


@compiled
def _nothing(slots, stride, count, runs, begins, tables, vectors, target, target_stride, spare):
    """Where bytes cannot be picked, nothing of this is even compiled."""


decode_spread = _decode_all if THERE else _nothing
