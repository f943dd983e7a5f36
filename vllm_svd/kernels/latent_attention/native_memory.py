"""Machine code of the compiled decode path: how memory is read.

Importing this imports numba and compiles nothing. Arrays are bare addresses: no reference counts,
no checks, no wrapping of negative indices in the inner loops. Their rows are contiguous fp32.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.format import STORES
from vllm_svd.kernels.latent_attention.native import KINDS

FLOAT32, BFLOAT16 = KINDS[torch.float32], KINDS[torch.bfloat16]
FP8, INT8, INT4 = (STORES.index(store) for store in ("fp8_e4m3", "int8", "int4"))
HUGE = 1 << 40
# Sums in any order, fused; but infinities and NaN must stay what they are.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function):
    """For calls from `team` alone, into which all of this is inlined."""
    return njit(fastmath=FAST, error_model="numpy", nogil=True)(function)


@intrinsic
def pointer(typingctx, address):  # noqa: ARG001
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def count_up(typingctx, address):  # noqa: ARG001
    """Count the int64 at an address up, atomically; its former value."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), generate


@compiled
def ints(address):
    """The int64 array at an address."""
    return carray(pointer(address), (HUGE,), dtype=np.int64)


@compiled
def floats(address):
    """The fp32 array at an address."""
    return carray(pointer(address), (HUGE,), dtype=np.float32)


@compiled
def words(address):
    """The uint32 array at an address."""
    return carray(pointer(address), (HUGE,), dtype=np.uint32)


@compiled
def halves(address):
    """The uint16 array at an address."""
    return carray(pointer(address), (HUGE,), dtype=np.uint16)


@compiled
def octets(address):
    """The uint8 array at an address."""
    return carray(pointer(address), (HUGE,), dtype=np.uint8)


@compiled
def widen(kind, source, count, target):
    """Floats of a contiguous row."""
    out, bits = floats(target), words(target)
    if kind == FLOAT32:
        read = floats(source)
        for i in range(count):
            out[i] = read[i]
        return
    half = halves(source)
    if kind == BFLOAT16:
        for i in range(count):
            bits[i] = np.uint32(half[i]) << np.uint32(16)
        return
    for i in range(count):
        code = np.uint32(half[i])
        sign = (code & np.uint32(0x8000)) << np.uint32(16)
        exponents = np.uint32(0x7C00)
        special = np.uint32(0x7F800000) if code & exponents == exponents else np.uint32(0)
        bits[i] = sign | special | ((code & np.uint32(0x7FFF)) << np.uint32(13))
    for i in range(count):
        out[i] *= np.float32(2.0**112)  # the exponents' biases: 127 - 15


@compiled
def decode(slot, runs, num_runs, scale_table, fp8_table, target):
    """Floats of the latent of one slot, as codec.decode."""
    scales, levels, entries = floats(scale_table), floats(fp8_table), octets(slot)
    for run in range(num_runs):
        of = ints(runs + 40 * run)
        kind, count = of[0], of[2]
        codes, out = octets(slot + of[3]), floats(target + 4 * of[1])
        scale = scales[np.int64(entries[of[4]])]
        if kind == FP8:
            for i in range(count):
                out[i] = levels[np.int64(codes[i])] * scale
        elif kind == INT8:
            for i in range(count):
                out[i] = np.float32(np.int8(codes[i])) * scale
        else:
            bits, middle = (4, np.float32(7.5)) if kind == INT4 else (2, np.float32(1.5))
            count = count * bits // 8
            for part in range(8 // bits):
                out = floats(target + 4 * (of[1] + part * count))
                shift, mask = np.uint8(part * bits), np.uint8((1 << bits) - 1)
                for i in range(count):
                    code = np.int32((codes[i] >> shift) & mask)
                    out[i] = (np.float32(code) - middle) * scale
