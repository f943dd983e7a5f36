"""Machine code of the compiled attention: arithmetic on one tile of tokens.

Arguments are addresses of rows of fp32, whose strides are in bytes. Tokens lie side by side in the
lanes of a vector, so that no sum is ever taken across one; channels come in whole vectors, of which
what lies beyond the last channel may be anything.
"""

import math
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.memory import (
    INTEGERS,
    VECTOR,
    all_lanes,
    compiled,
    floats,
    splat,
)


@compiled
def fill(out, count, value):
    """Set so many floats."""
    values = floats(out)
    for i in range(count):
        values[i] = value


@compiled
def multiply(x, y, count):
    """x = x * y."""
    values, factors = floats(x), floats(y)
    for i in range(count):
        values[i] *= factors[i]


@compiled
def cap(x, count, limit):
    """x = limit * tanh(x / limit), by the continued fraction of an eighth, doubled three times."""
    values = floats(x)
    for i in range(count):
        u = values[i] / (np.float32(8) * limit)
        u = np.float32(1.25) if u > np.float32(1.25) else u  # tanh(10) is 1
        u = np.float32(-1.25) if u < np.float32(-1.25) else u
        s = u * u
        up = np.float32(135135) + s * (np.float32(17325) + s * (np.float32(378) + s))
        down = np.float32(62370) + s * (np.float32(3150) + s * np.float32(28))
        t = u * up / (np.float32(135135) + s * down)
        t = (t + t) / (np.float32(1) + t * t)
        t = (t + t) / (np.float32(1) + t * t)
        t = (t + t) / (np.float32(1) + t * t)
        values[i] = limit * t


@contextmanager
def _vectors(builder, x, first, last):
    """Generates a loop over the vectors of a row that hold lanes `first` to `last`, and which."""
    word = ir.IntType(64)
    places = ir.Constant(ir.VectorType(word, LANES), list(range(LANES)))
    begin = builder.and_(first, word(-LANES))
    with cgutils.for_range_slice(builder, begin, last, word(LANES)) as (i, _):
        lanes = builder.add(splat(builder, i), places)
        used = builder.and_(
            builder.icmp_signed(">=", lanes, splat(builder, first)),
            builder.icmp_signed("<", lanes, splat(builder, last)),
        )
        place = builder.inttoptr(builder.add(x, builder.mul(i, word(4))), VECTOR.as_pointer())
        yield place, used


def _reduced(builder, vector, combine):
    """One value of the lanes of a vector, by halves."""
    size = LANES
    while size > 1:
        size //= 2
        pick = ir.VectorType(ir.IntType(32), size)
        low, high = (ir.Constant(pick, list(range(at, at + size))) for at in (0, size))
        vector = combine(
            builder.shuffle_vector(vector, vector, low),
            builder.shuffle_vector(vector, vector, high),
        )
    return builder.extract_element(vector, ir.IntType(32)(0))


@intrinsic
def largest(typingctx, x, first, last):
    """The greatest of x[first:last], or -inf; what is not a number is passed over."""

    def generate(context, builder, signature, arguments):
        def greater(one, other):
            return builder.select(builder.fcmp_ordered(">", one, other), one, other)

        highest = cgutils.alloca_once_value(builder, all_lanes(-np.inf))
        with _vectors(builder, *arguments) as (place, used):
            values = builder.select(used, builder.load(place, align=4), all_lanes(-np.inf))
            builder.store(greater(values, builder.load(highest)), highest)
        return _reduced(builder, builder.load(highest), greater)

    return types.float32(types.int64, types.int64, types.int64), generate


# ln(2)^n / n! from n = 6 down to 0: of order 1e-8 on [-1/2, 1/2].
_TAYLOR = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]


@intrinsic
def exp2(typingctx, x, first, last, highest):
    """x[first:last] = 2^(x - highest), at least 2^-126, the rest of their vectors 0; their sum."""

    def generate(context, builder, signature, arguments):
        x, first, last, highest = arguments
        shift = splat(builder, highest)
        sums = cgutils.alloca_once_value(builder, all_lanes(0.0))
        fast = {"flags": ("contract",)}
        with _vectors(builder, x, first, last) as (place, used):
            y = builder.fsub(builder.load(place, align=4), shift)
            y = builder.select(
                builder.fcmp_ordered("<", y, all_lanes(-126.0)), all_lanes(-126.0), y
            )
            number = builder.fcmp_ordered("ord", y, y)
            steps = builder.fsub(builder.select(number, y, all_lanes(0.0)), all_lanes(0.5))
            steps = builder.fptosi(steps, INTEGERS)  # to the nearest: y is not above 0
            part = builder.fsub(y, builder.sitofp(steps, VECTOR))  # NaN stays NaN
            power = all_lanes(_TAYLOR[0])
            for coefficient in _TAYLOR[1:]:
                power = builder.fmul(power, part, **fast)
                power = builder.fadd(power, all_lanes(coefficient), **fast)
            bits = builder.add(steps, all_lanes(127))
            bits = builder.shl(bits, all_lanes(23))
            weights = builder.fmul(power, builder.bitcast(bits, VECTOR))
            weights = builder.select(used, weights, all_lanes(0.0))
            builder.store(weights, place, align=4)
            builder.store(builder.fadd(builder.load(sums), weights), sums)
        return _reduced(builder, builder.load(sums), builder.fadd)

    integer = types.int64
    return types.float32(integer, integer, integer, types.float32), generate
