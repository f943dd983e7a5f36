"""Products in machine code. Sums are in fp32; addresses, and strides in bytes."""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.features import has
from vllm_svd.kernels.native.memory import (
    FLOAT32,
    HALVES,
    VECTOR,
    all_lanes,
    as_floats,
    compiled,
    floats,
    splat,
    widen,
)

# Sums that a product keeps in registers: with AVX-512 half of its 32; else half of 16, two each.
SUMS = 16 if has("avx512f") else 4


@compiled
def times(matrix, kind, stride, rows, width, x, out, spare):
    """out [rows] = matrix [rows, width] x; `spare` holds four rows."""
    y, right, row = floats(out), floats(x), 0
    while row < rows:
        address, step, four = matrix + row * stride, stride, row + 4 <= rows
        if kind != FLOAT32:
            step = 4 * width
            for r in range(4 if four else 1):
                widen(kind, address + r * stride, width, spare + r * step)
            address = spare
        left = floats(address)
        total = np.float32(0)
        if not four:
            for i in range(width):
                total += left[i] * right[i]
            y[row] = total
            row += 1
            continue
        # Sums across vectors take their time, of four rows at once as of one.
        left1, left2 = floats(address + step), floats(address + 2 * step)
        left3 = floats(address + 3 * step)
        total1 = total2 = total3 = np.float32(0)
        for i in range(width):
            total += left[i] * right[i]
            total1 += left1[i] * right[i]
            total2 += left2[i] * right[i]
            total3 += left3[i] * right[i]
        y[row], y[row + 1], y[row + 2], y[row + 3] = total, total1, total2, total3
        row += 4


def _block(rows, vectors, half):
    """out [rows, vectors * LANES] = keep * out + a[:, first:last] b[first:last], b bf16 if `half`.

    Sums stay in registers over all of the loop, which the compiler does not find by itself.
    """

    @intrinsic
    def add(typingctx, a, a_stride, b, b_stride, first, last, out, out_stride, keep):
        word = ir.IntType(64)
        zero = all_lanes(0.0)
        # Few sums would wait for themselves: each is then taken in so many chains.
        chains = max(1, SUMS // 2 // (rows * vectors))

        def generate(context, builder, signature, arguments):
            a, a_stride, b, b_stride, first, last, out, out_stride, keep = arguments

            def at(address, index, stride, kind):
                moved = builder.add(address, builder.mul(index, stride))
                return builder.inttoptr(moved, kind.as_pointer())

            def vectors_at(address, kind=VECTOR, size=4):
                starts = [builder.add(address, word(size * LANES * v)) for v in range(vectors)]
                return [builder.inttoptr(start, kind.as_pointer()) for start in starts]

            def read(address):
                if not half:
                    return [builder.load(place, align=4) for place in vectors_at(address)]
                places = vectors_at(address, HALVES, 2)
                return [as_floats(builder, builder.load(place, align=2)) for place in places]

            targets = [
                vectors_at(builder.add(out, builder.mul(word(row), out_stride)))
                for row in range(rows)
            ]
            kept = builder.icmp_signed("!=", keep, word(0))
            sums = [
                [[cgutils.alloca_once_value(builder, zero) for _ in of] for of in targets]
                for _ in range(chains)
            ]
            starts = [builder.add(a, builder.mul(word(row), a_stride)) for row in range(rows)]

            def step(k, chain):
                rights = read(builder.add(b, builder.mul(k, b_stride)))
                for start, totals in zip(starts, chain, strict=True):
                    left = builder.load(at(start, k, word(4), ir.FloatType()), align=4)
                    left = splat(builder, left)
                    for right, total in zip(rights, totals, strict=True):
                        product = builder.fmul(left, right, flags=("contract",))
                        added = builder.fadd(builder.load(total), product, flags=("contract",))
                        builder.store(added, total)

            left = builder.srem(builder.sub(last, first), word(chains))
            whole = builder.sub(last, left)
            with cgutils.for_range_slice(builder, first, whole, word(chains)) as (k, _):
                for i, chain in enumerate(sums):
                    step(builder.add(k, word(i)), chain)
            with cgutils.for_range_slice(builder, whole, last, word(1)) as (k, _):
                step(k, sums[0])
            for row, places in enumerate(targets):
                for v, place in enumerate(places):
                    # What was there comes last: many small terms, one by one, would be lost in it.
                    found = [builder.load(chain[row][v]) for chain in sums]
                    found.append(builder.select(kept, builder.load(place, align=4), zero))
                    builder.store(functools.reduce(builder.fadd, found), place, align=4)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(*[integer] * 9), generate

    return add


def _rows(rows, half):
    """The product of so many rows, all columns: most at a time, then half as many, then one."""
    most, item = max(1, min(4, SUMS // rows)), 2 if half else 4
    fewer = max(1, most // 2)
    many, some, one = (_block(rows, vectors, half) for vectors in (most, fewer, 1))

    @compiled
    def columns(a, a_stride, b, b_stride, first, last, out, out_stride, count, keep):
        i = 0
        while i + most * LANES <= count:
            many(a, a_stride, b + item * i, b_stride, first, last, out + 4 * i, out_stride, keep)
            i += most * LANES
        if i + fewer * LANES <= count:
            some(a, a_stride, b + item * i, b_stride, first, last, out + 4 * i, out_stride, keep)
            i += fewer * LANES
        while i < count:
            one(a, a_stride, b + item * i, b_stride, first, last, out + 4 * i, out_stride, keep)
            i += LANES

    return columns


def _few_rows(half):
    """The product of any number of rows, four at most at a time."""
    four, two, one = (_rows(rows, half) for rows in (4, 2, 1))

    @compiled
    def few(a, a_stride, rows, b, b_stride, first, last, out, out_stride, count, keep):
        row = 0
        while row + 4 <= rows:
            left, to = a + row * a_stride, out + row * out_stride
            four(left, a_stride, b, b_stride, first, last, to, out_stride, count, keep)
            row += 4
        if row + 2 <= rows:
            left, to = a + row * a_stride, out + row * out_stride
            two(left, a_stride, b, b_stride, first, last, to, out_stride, count, keep)
            row += 2
        if row < rows:
            left, to = a + row * a_stride, out + row * out_stride
            one(left, a_stride, b, b_stride, first, last, to, out_stride, count, keep)

    return few


_few, _eight = _few_rows(False), _rows(8, False)
# As `product`, b in bf16.
product_of_halves = _few_rows(True)


@compiled
def product(a, a_stride, rows, b, b_stride, first, last, out, out_stride, count, keep):
    """out [rows, count] = keep * out + a[:, first:last] b[first:last]; `count` in whole vectors.

    Where columns are few, a product of four rows would wait for its few sums.
    """
    row, wide = 0, count
    if rows >= 8 and SUMS >= 8:
        wide = count // (4 * LANES) * 4 * LANES
    _few(a, a_stride, rows, b, b_stride, first, last, out, out_stride, wide, keep)
    if wide == count:
        return
    b, out, count = b + 4 * wide, out + 4 * wide, count - wide
    while row + 8 <= rows:
        left, to = a + row * a_stride, out + row * out_stride
        _eight(left, a_stride, b, b_stride, first, last, to, out_stride, count, keep)
        row += 8
    left, to = a + row * a_stride, out + row * out_stride
    _few(left, a_stride, rows - row, b, b_stride, first, last, to, out_stride, count, keep)
