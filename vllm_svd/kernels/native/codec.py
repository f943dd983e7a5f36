"""The codec of tiers in machine code, a latent of one token and group at a time."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from vllm_svd.format import STORES
from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.memory import (
    INTEGERS,
    VECTOR,
    all_lanes,
    compiled,
    floats,
    ints,
    octets,
    splat,
)

FP8, INT8, INT4, INT2 = (STORES.index(store) for store in ("fp8_e4m3", "int8", "int4", "int2"))


@njit(nogil=True)
def _fp8(x):
    """Bits of the nearest e4m3, ties to even; |x| is at most 448 but for rounding."""
    bits = np.array([min(abs(x), np.float32(448))], dtype=np.float32).view(np.uint32)
    magnitude = np.int64(bits[0])
    if magnitude >= 0x3C800000:  # 2^-6: three bits of mantissa, a bias of 7 in place of 127
        code = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    else:
        code = np.int64(np.rint(min(abs(x), np.float32(448)) * np.float32(512)))
    return code + (128 if x < 0 else 0)


@njit(nogil=True)
def _level(x, largest):
    """The nearest value of a code of few bits."""
    return min(max(np.floor(x) + np.float32(0.5), -largest), largest)


@njit(nogil=True)
def _best(latent, byte, tried, scales, largest):
    """The scale of least squared error among so many from `byte` down."""
    best, least = byte, np.float32(np.inf)
    for lower in range(tried):
        candidate = max(byte - lower, 0)
        scale, error = scales[candidate], np.float32(0)
        for i in range(len(latent)):
            miss = _level(latent[i] / scale, largest) * scale - latent[i]
            error += miss * miss
        if error < least:
            best, least = candidate, error
    return best


@njit(nogil=True)
def _codes(latent, kind, scale, largest, out):
    """Codes of a tier to the bytes from out[0] on."""
    if kind == INT8:
        for i in range(len(latent)):
            level = min(max(np.rint(latent[i] / scale), -largest), largest)
            out[i] = np.uint8(np.int64(level) & 255)
        return
    if kind == FP8:
        for i in range(len(latent)):
            out[i] = np.uint8(_fp8(latent[i] / scale))
        return
    bits = 4 if kind == INT4 else 2
    size = len(latent) * bits // 8
    for i in range(size):
        packed = np.int64(0)
        for part in range(8 // bits):
            level = _level(latent[part * size + i] / scale, largest) + largest
            packed |= np.int64(level) << (part * bits)
        out[i] = np.uint8(packed)


@njit(nogil=True)
def encode(latent, runs, num_runs, tables, row):
    """Codes and scales of a latent, fp32 at an address, to the slot at `row`; see codec.encode.

    `tables` are the addresses of codec.bounds, codec.scales, LARGEST and TRIED by store.
    """
    bounds, scales, largest, tried = tables
    values, largest, tried, scales = floats(latent), floats(largest), ints(tried), floats(scales)
    for run in range(num_runs):
        of = ints(runs + 40 * run)
        kind, count, out = of[0], of[2], octets(row)
        part = values[of[1] : of[1] + count]
        high, finite = np.float32(0), True
        for i in range(count):
            finite = finite and np.isfinite(part[i])
            high = max(high, abs(part[i]))
        if not finite:  # whatever the codes are, they are read as NaN
            out[of[4]] = 255
            continue
        byte, bound = 0, floats(bounds + 1024 * kind)
        while high > bound[byte]:
            byte += 1
        if tried[kind] > 1:
            byte = _best(part, byte, tried[kind], scales, largest[kind])
        _codes(part, kind, scales[byte], largest[kind], out[of[3] :])
        out[of[4]] = byte


_OCTETS = ir.VectorType(ir.IntType(8), LANES)


def _codes_at(builder, address):
    codes = builder.load(builder.inttoptr(address, _OCTETS.as_pointer()), align=1)
    return builder.zext(codes, INTEGERS)


def fp8_bits(builder, codes):
    """The bits of the floats that e4m3 numbers are, NaN aside, which stands beside its scale."""
    size = builder.and_(codes, all_lanes(0x7F))
    # The exponent's bias is 7 in place of 127; below 2^-6 are multiples of 2^-9.
    normal = builder.add(builder.shl(size, all_lanes(20)), all_lanes(120 << 23))
    multiple = builder.fmul(builder.sitofp(size, VECTOR), all_lanes(2.0**-9))
    small = builder.icmp_signed("<", size, all_lanes(8))
    bits = builder.select(small, builder.bitcast(multiple, INTEGERS), normal)
    return builder.or_(bits, builder.shl(builder.and_(codes, all_lanes(0x80)), all_lanes(24)))


# In vectors, which the compiler does not find by itself in loops over parts of bytes.
@intrinsic
def _levels(typingctx, codes, shift, mask, flip, middle, scale, out):
    """out [LANES] = ((((codes >> shift) & mask) ^ flip) - middle) * scale."""

    def generate(context, builder, signature, arguments):
        codes, shift, mask, flip, middle, scale, out = arguments
        narrow = [builder.trunc(value, ir.IntType(32)) for value in (shift, mask, flip)]
        shift, mask, flip = (splat(builder, value) for value in narrow)
        read = builder.and_(builder.lshr(_codes_at(builder, codes), shift), mask)
        level = builder.sitofp(builder.xor(read, flip), VECTOR)
        level = builder.fsub(level, splat(builder, middle))
        level = builder.fmul(level, splat(builder, scale))
        builder.store(level, builder.inttoptr(out, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 4, types.float32, types.float32, integer), generate


@intrinsic
def _fp8_levels(typingctx, codes, scale, out):
    """out [LANES] = e4m3 numbers of these bits, times scale; NaN stands beside a scale of NaN."""

    def generate(context, builder, signature, arguments):
        codes, scale, out = arguments
        level = builder.bitcast(fp8_bits(builder, _codes_at(builder, codes)), VECTOR)
        level = builder.fmul(level, splat(builder, scale))
        builder.store(level, builder.inttoptr(out, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@compiled
def decode(slots, stride, count, runs, num_runs, scale_table, target, target_stride):
    """Floats of the latents of `count` slots, as codec.decode.

    Whole chunks are read and written: up to LANES bytes beyond a slot, and as many floats beyond a
    row, which must be spare.
    """
    scales = floats(scale_table)
    for run in range(num_runs):
        of = ints(runs + 40 * run)
        kind, channels, codes, out = of[0], of[2], slots + of[3], target + 4 * of[1]
        bits, flip, middle = 8, 128, np.float32(128)  # two's complement
        if kind == INT4:
            bits, flip, middle = 4, 0, np.float32(7.5)
        elif kind == INT2:
            bits, flip, middle = 2, 0, np.float32(1.5)
        size, mask = channels * bits // 8, (1 << bits) - 1
        for t in range(count):
            scale = scales[np.int64(octets(slots + t * stride + of[4])[0])]
            read, row = codes + t * stride, out + t * target_stride
            if kind == FP8:
                for i in range(0, size, LANES):
                    _fp8_levels(read + i, scale, row + 4 * i)
                continue
            for part in range(8 // bits):
                for i in range(0, size, LANES):
                    place = row + 4 * (part * size + i)
                    _levels(read + i, part * bits, mask, flip, middle, scale, place)
