"""Rows of tokens turned into rows of channels, so that no sum is ever taken across a vector."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.memory import INTEGERS, all_lanes, compiled

_WORD = ir.IntType(64)


def _at(builder, address, row, stride):
    moved = builder.add(address, builder.mul(_WORD(row), stride))
    return builder.inttoptr(moved, INTEGERS.as_pointer())


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


def _turn(halves):
    """target = source^T of LANES rows, of as many words, or of twice as many bf16 to floats."""

    @intrinsic
    def turn(typingctx, source, source_stride, target, target_stride):
        def generate(context, builder, signature, arguments):
            source, source_stride, target, target_stride = arguments
            places = [_at(builder, source, row, source_stride) for row in range(LANES)]
            rows = _shuffled(builder, [builder.load(place, align=1) for place in places])
            if halves:
                upper, bits = all_lanes(-1 << 16), all_lanes(16)
                pairs = [(builder.shl(row, bits), builder.and_(row, upper)) for row in rows]
                rows = [row for pair in pairs for row in pair]
            for channel, row in enumerate(rows):
                builder.store(row, _at(builder, target, channel, target_stride), align=4)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(*[integer] * 4), generate

    return turn


_turn_words, _turn_halves = _turn(False), _turn(True)


@compiled
def transpose_words(source, stride, count, target, target_stride):
    """target [count, LANES] of LANES rows of so many words; whole vectors are read and written."""
    for i in range(0, count, LANES):
        _turn_words(source + 4 * i, stride, target + i * target_stride, target_stride)


@compiled
def transpose_halves(source, stride, count, target, target_stride):
    """As transpose_words, of so many bf16, which become floats."""
    for i in range(0, count, 2 * LANES):
        _turn_halves(source + 2 * i, stride, target + i * target_stride, target_stride)
