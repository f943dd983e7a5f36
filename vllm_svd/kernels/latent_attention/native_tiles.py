"""Machine code of the compiled decode path: arithmetic on one tile of tokens.

Arguments are addresses of contiguous rows of fp32, and sizes in floats.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.latent_attention.team import AHEAD, LANES, ROWS
from vllm_svd.kernels.native.memory import compiled, floats, words


@compiled
def fill(out, count, value):
    """Set so many floats."""
    values = floats(out)
    for i in range(count):
        values[i] = value


@compiled
def transpose(rows, rank, strip):
    """strip [rank, LANES] of rows [LANES, rank]."""
    for k in range(rank):
        out = floats(strip + 4 * LANES * k)
        for lane in range(LANES):
            out[lane] = floats(rows + 4 * (lane * rank + k))[0]


@compiled
def channel(i, rotary_dim, is_neox):
    """Which channel of a key is kept at i: both styles then pair i with i + rotary_dim / 2."""
    if is_neox or i >= rotary_dim:
        return i
    half = rotary_dim // 2
    return 2 * i if i < half else 2 * (i - half) + 1


@intrinsic
def _add_block(typingctx, a, a_stride, b, b_stride, first, last, out, out_stride, keep):  # noqa: ARG001
    """out [ROWS, LANES] = keep * out + a[:, first:last] b[first:last]; strides in bytes.

    Sums stay in registers over all of the loop, which the compiler does not find by itself.
    """
    vector, word, item = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64), ir.FloatType()
    zero, splat = (
        ir.Constant(vector, [0.0] * LANES),
        ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES),
    )

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        a, a_stride, b, b_stride, first, last, out, out_stride, keep = arguments

        def at(address, index, stride, kind):
            moved = builder.add(address, builder.mul(index, stride))
            return builder.inttoptr(moved, kind.as_pointer())

        targets = [at(out, word(row), out_stride, vector) for row in range(ROWS)]
        kept = builder.icmp_signed("!=", keep, word(0))
        sums = [cgutils.alloca_once(builder, vector) for _ in targets]  # registers, once optimised
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.select(kept, builder.load(target, align=4), zero), total)
        with cgutils.for_range_slice(builder, first, last, word(1)) as (k, _):
            right = builder.load(at(b, k, b_stride, vector), align=4)
            for row, total in enumerate(sums):
                start = builder.add(a, builder.mul(word(row), a_stride))
                left = builder.load(at(start, k, word(4), item), align=4)
                left = builder.insert_element(zero, left, ir.IntType(32)(0))
                left = builder.shuffle_vector(left, zero, splat)
                product = builder.fmul(left, right, flags=("contract",))
                builder.store(
                    builder.fadd(builder.load(total), product, flags=("contract",)), total
                )
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.load(total), target, align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 9), generate


@compiled
def rebuild(latents, rank, count, up, out, width):
    """out [count, width] = latents [count, rank] up, this in strips [rank, LANES]."""
    for strip in range(width // LANES):
        b = up + 4 * strip * rank * LANES
        for row in range(0, count, ROWS):
            a, target = latents + 4 * row * rank, out + 4 * (row * width + strip * LANES)
            _add_block(a, 4 * rank, b, 4 * LANES, 0, rank, target, 4 * width, 0)


@compiled
def add_product(a, a_stride, rows, b, first, last, out, count):
    """out [rows, count] += a[:, first:last] b[first:last]."""
    whole_rows, whole = rows // ROWS * ROWS, count // LANES * LANES
    for row in range(0, whole_rows, ROWS):
        left, target = a + 4 * row * a_stride, out + 4 * row * count
        for i in range(0, whole, LANES):
            _add_block(
                left, 4 * a_stride, b + 4 * i, 4 * count, first, last, target + 4 * i, 4 * count, 1
            )
    for row in range(rows):
        begin = whole if row < whole_rows else 0
        weights, target = floats(a + 4 * row * a_stride), floats(out + 4 * (row * count + begin))
        size = count - begin
        k = first
        while size and k < last:
            b0, b1 = floats(b + 4 * (k * count + begin)), floats(b + 4 * ((k + 1) * count + begin))
            x0 = weights[k]
            if k + 4 > last:
                for i in range(size):
                    target[i] += x0 * b0[i]
                k += 1
                continue
            b2, b3 = (
                floats(b + 4 * ((k + 2) * count + begin)),
                floats(b + 4 * ((k + 3) * count + begin)),
            )
            x1, x2, x3 = weights[k + 1], weights[k + 2], weights[k + 3]
            for i in range(size):
                target[i] += x0 * b0[i] + x1 * b1[i] + x2 * b2[i] + x3 * b3[i]
            k += 4


@compiled
def dot(query, keys, stride, first, last, out):
    """out[first:last] = keys[first:last] query, and up to AHEAD - 1 entries beyond."""
    q, s = floats(query), floats(out)
    for t in range(first, last, AHEAD):
        k0, k1 = floats(keys + 4 * t * stride), floats(keys + 4 * (t + 1) * stride)
        k2, k3 = floats(keys + 4 * (t + 2) * stride), floats(keys + 4 * (t + 3) * stride)
        k4, k5 = floats(keys + 4 * (t + 4) * stride), floats(keys + 4 * (t + 5) * stride)
        k6, k7 = floats(keys + 4 * (t + 6) * stride), floats(keys + 4 * (t + 7) * stride)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for i in range(stride):
            x = q[i]
            s0 += x * k0[i]
            s1 += x * k1[i]
            s2 += x * k2[i]
            s3 += x * k3[i]
            s4 += x * k4[i]
            s5 += x * k5[i]
            s6 += x * k6[i]
            s7 += x * k7[i]
        s[t], s[t + 1], s[t + 2], s[t + 3] = s0, s1, s2, s3
        s[t + 4], s[t + 5], s[t + 6], s[t + 7] = s4, s5, s6, s7


@njit(fastmath={"reassoc", "nnan", "nsz"}, nogil=True)
def largest(x, count, highest):
    """A score that is not a number may win or be passed over: its weight is NaN either way."""
    values = floats(x)
    for i in range(count):
        if values[i] > highest:
            highest = values[i]
    return highest


@compiled
def exp2(x, count, highest, power):
    """x = 2^(x - highest), at least 2^-126; their sum. `power` holds as many floats."""
    values, bits, powers = floats(x), words(power), floats(power)
    for i in range(count):
        y = values[i] - highest
        y = np.float32(-126) if y < np.float32(-126) else y  # NaN stays NaN, whatever its bits
        whole = np.floor(y + np.float32(0.5))
        bits[i] = np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23)
        f = y - whole
        p = np.float32(1.5252734e-5)  # ln(2)^n / n! down to n = 0: of order 1e-8 on [-1/2, 1/2]
        p = p * f + np.float32(1.5403530e-4)
        p = p * f + np.float32(1.3333558e-3)
        p = p * f + np.float32(9.6181291e-3)
        p = p * f + np.float32(5.5504109e-2)
        p = p * f + np.float32(2.4022651e-1)
        p = p * f + np.float32(6.9314718e-1)
        values[i] = p * f + np.float32(1)
    total = np.float32(0)
    for i in range(count):
        values[i] *= powers[i]
        total += values[i]
    return total
