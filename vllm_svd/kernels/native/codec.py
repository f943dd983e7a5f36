"""The codec of tiers in machine code, a latent of one token and group at a time."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from vllm_svd.format import STORES
from vllm_svd.kernels.native import CHUNK
from vllm_svd.kernels.native.memory import compiled, floats, ints, octets

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


@intrinsic
def _levels(typingctx, codes, shift, mask, flip, middle, scale, out):  # noqa: ARG001
    """out [CHUNK] = ((((codes >> shift) & mask) ^ flip) - middle) * scale.

    In vectors, which the compiler does not find by itself in loops over parts of bytes.
    """
    octets_of, integers = (ir.VectorType(ir.IntType(size), CHUNK) for size in (8, 32))
    numbers = ir.VectorType(ir.FloatType(), CHUNK)
    zeros = ir.Constant(integers, [0] * CHUNK)  # to shuffle with: all lanes are the first

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        codes, shift, mask, flip, middle, scale, out = arguments

        def splat(value, kind):
            if isinstance(value.type, ir.IntType):
                value = builder.trunc(value, ir.IntType(32))
            first = builder.insert_element(
                ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
            )
            return builder.shuffle_vector(first, first, zeros)

        def at(address, kind):
            return builder.inttoptr(address, kind.as_pointer())

        read = builder.zext(builder.load(at(codes, octets_of), align=1), integers)
        read = builder.and_(builder.lshr(read, splat(shift, integers)), splat(mask, integers))
        level = builder.sitofp(builder.xor(read, splat(flip, integers)), numbers)
        level = builder.fmul(builder.fsub(level, splat(middle, numbers)), splat(scale, numbers))
        builder.store(level, at(out, numbers), align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 4, types.float32, types.float32, integer), generate


@compiled
def decode(slot, runs, num_runs, scale_table, fp8_table, target):
    """Floats of the latent of one slot, as codec.decode.

    Whole chunks are read and written: up to CHUNK bytes beyond the slot, and as many floats beyond
    those of a run, of which later runs overwrite all but what lies beyond the latent.
    """
    scales, levels, entries = floats(scale_table), floats(fp8_table), octets(slot)
    for run in range(num_runs):
        of = ints(runs + 40 * run)
        kind, count = of[0], of[2]
        codes, out = slot + of[3], target + 4 * of[1]
        scale = scales[np.int64(entries[of[4]])]
        if kind == FP8:
            for i in range(count):
                floats(out)[i] = levels[np.int64(octets(codes)[i])] * scale
            continue
        bits, flip, middle = 8, 128, np.float32(128)  # two's complement
        if kind == INT4:
            bits, flip, middle = 4, 0, np.float32(7.5)
        elif kind == INT2:
            bits, flip, middle = 2, 0, np.float32(1.5)
        count = count * bits // 8
        for part in range(8 // bits):
            for i in range(0, count, CHUNK):
                place = out + 4 * (part * count + i)
                _levels(codes + i, part * bits, (1 << bits) - 1, flip, middle, scale, place)
