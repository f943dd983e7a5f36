"""Rows of tokens turned into rows of channels, so that no sum is ever taken across a vector."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.memory import (
    BFLOAT16,
    FLOAT32,
    INTEGERS,
    VECTOR,
    all_lanes,
    compiled,
    whole,
    widen,
)

_WORD = ir.IntType(64)


def _at(builder, address, row, stride, kind):
    moved = builder.add(address, builder.mul(_WORD(row), stride))
    return builder.inttoptr(moved, kind.as_pointer())


def _shuffled(builder, rows):
    """LANES rows of as many lanes, transposed, without crossing quarters of vectors at first."""

    def pick(first, second, of_quarter):
        """Lanes of both: four for each quarter of the result."""
        lanes = [lane for quarter in range(4) for lane in of_quarter(quarter)]
        return builder.shuffle_vector(first, second, ir.Constant(INTEGERS, lanes))

    def ones(first, second, half):
        def of(q):
            return [4 * q + 2 * half + j // 2 + LANES * (j % 2) for j in range(4)]

        return pick(first, second, of)

    def pairs(first, second, half):
        def of(q):
            return [4 * q + 2 * half + j % 2 + LANES * (j // 2) for j in range(4)]

        return pick(first, second, of)

    def quarters(first, second, odd):
        return pick(first, second, lambda q: [4 * (odd + 2 * q) + j for j in range(4)])

    for step, stride in ((ones, 1), (pairs, 2), (quarters, 4), (quarters, 8)):
        turned = list(rows)
        for row in range(LANES):
            if not row & stride:
                turned[row] = step(rows[row], rows[row + stride], 0)
                turned[row + stride] = step(rows[row], rows[row + stride], 1)
        rows = turned
    # The first two steps leave pairs of channels in each other's place.
    return [rows[row & 12 | (row & 1) << 1 | (row & 2) >> 1] for row in range(LANES)]


@intrinsic
def _floats(typingctx, source, source_stride, target, target_stride):  # noqa: ARG001
    """target [LANES, LANES] = source^T."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        source, source_stride, target, target_stride = arguments
        places = [_at(builder, source, row, source_stride, VECTOR) for row in range(LANES)]
        rows = _shuffled(builder, [builder.load(place, align=4) for place in places])
        for channel, vector in enumerate(rows):
            place = _at(builder, target, channel, target_stride, VECTOR)
            builder.store(vector, place, align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 4), generate


@intrinsic
def _halves(typingctx, source, source_stride, target, target_stride):  # noqa: ARG001
    """target [2 * LANES, LANES] = source^T, this in bf16: pairs of channels move together."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        source, source_stride, target, target_stride = arguments
        places = [_at(builder, source, row, source_stride, INTEGERS) for row in range(LANES)]
        rows = _shuffled(builder, [builder.load(place, align=2) for place in places])
        upper, bits = all_lanes(-1 << 16), all_lanes(16)
        for pair, vector in enumerate(rows):
            for odd, found in enumerate((builder.shl(vector, bits), builder.and_(vector, upper))):
                place = _at(builder, target, 2 * pair + odd, target_stride, INTEGERS)
                builder.store(found, place, align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 4), generate


@compiled
def transpose(source, kind, stride, count, channels, target, target_stride, spare):
    """target [channels, LANES] of `count` rows of so many channels of any kind.

    No other row is read; rows of whole vectors are written; `spare` holds LANES of those.
    """
    step = 2 * LANES if kind == BFLOAT16 else LANES
    if count < LANES or channels % step or (kind != FLOAT32 and kind != BFLOAT16):
        for row in range(count):
            widen(kind, source + row * stride, channels, spare + 4 * row * whole(channels))
        source, kind, stride = spare, FLOAT32, 4 * whole(channels)
    if kind == FLOAT32:
        for i in range(0, channels, LANES):
            _floats(source + 4 * i, stride, target + i * target_stride, target_stride)
    else:
        for i in range(0, channels, 2 * LANES):
            _halves(source + 2 * i, stride, target + i * target_stride, target_stride)
