"""How machine code reads and writes memory.

Importing this imports numba and compiles nothing. Arrays are bare addresses: no reference counts,
no checks, no wrapping of negative indices in the inner loops. Their rows are contiguous fp32.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.native import KINDS, LANES

FLOAT32, BFLOAT16 = KINDS[torch.float32], KINDS[torch.bfloat16]
HUGE = 1 << 40
# Sums in any order, fused; but infinities and NaN must stay what they are.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function):
    """For calls from kernels alone, into which all of this is inlined."""
    return njit(fastmath=FAST, error_model="numpy", nogil=True)(function)


@compiled
def whole(count):
    """The lanes of the vectors that hold so many."""
    return (count + LANES - 1) // LANES * LANES


@intrinsic
def pointer(typingctx, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def address(typingctx, pointer):
    """A pointer as an address."""

    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


@intrinsic
def count_up(typingctx, address):
    """Count the int64 at an address up, atomically; its former value."""

    def generate(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def _prefetch(typingctx, address):
    def generate(context, builder, signature, arguments):
        place, word = builder.inttoptr(arguments[0], cgutils.voidptr_t), ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(function, [place, word(0), word(3), word(1)])  # to read, soon, data
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
def prefetch(address, size):
    """Ask for so many bytes ahead of their use."""
    for line in range(address, address + size, 64):
        _prefetch(line)


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
def copy(source, size, target):
    """So many bytes."""
    read, out = octets(source), octets(target)
    for i in range(size):
        out[i] = read[i]


VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)


def all_lanes(value):
    """The vector of a constant, an int or a float."""
    return ir.Constant(INTEGERS if isinstance(value, int) else VECTOR, [value] * LANES)


def splat(builder, value):
    """The vector of a scalar, in all lanes."""
    first = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(first, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, all_lanes(0))


def called(builder, name, kind, *values):
    """What a function of LLVM of this name gives of them, of that kind."""
    signature = ir.FunctionType(kind, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.{name}.512")
    return builder.call(function, values)


def as_floats(builder, halves):
    """A vector of the bits of bf16, as one of fp32."""
    bits = builder.shl(builder.zext(halves, INTEGERS), all_lanes(16))
    return builder.bitcast(bits, VECTOR)


def _moved(half):
    """LANES floats from memory to memory, these as bf16 if `half`.

    In loops over arrays the compiler asks before every row whether its two ends overlap.
    """

    @intrinsic
    def move(typingctx, source, target):
        def generate(context, builder, signature, arguments):
            source, target = arguments
            place = builder.inttoptr(source, (HALVES if half else VECTOR).as_pointer())
            vector = builder.load(place, align=2 if half else 4)
            vector = as_floats(builder, vector) if half else vector
            builder.store(vector, builder.inttoptr(target, VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


_move_floats, _move_halves = _moved(False), _moved(True)


@compiled
def widen(kind, source, count, target):
    """Floats of a contiguous row."""
    out, bits = floats(target), words(target)
    vectors = count // LANES * LANES
    if kind == FLOAT32:
        for i in range(0, vectors, LANES):
            _move_floats(source + 4 * i, target + 4 * i)
        read = floats(source)
        for i in range(vectors, count):
            out[i] = read[i]
        return
    half = halves(source)
    if kind == BFLOAT16:
        for i in range(0, vectors, LANES):
            _move_halves(source + 2 * i, target + 4 * i)
        for i in range(vectors, count):
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
def narrow(kind, source, count, target):
    """A contiguous row of floats, each rounded to the nearest of its kind, ties to even."""
    if kind == FLOAT32:
        read, out = floats(source), floats(target)
        for i in range(count):
            out[i] = read[i]
        return
    bits, half = words(source), halves(target)
    if kind == BFLOAT16:
        for i in range(count):
            code = np.int64(bits[i])
            rounded = (code + 0x7FFF + ((code >> 16) & 1)) >> 16
            half[i] = 0x7FC0 if code & 0x7FFFFFFF > 0x7F800000 else rounded
        return
    for i in range(count):
        code = np.int64(bits[i])
        size, sign = code & 0x7FFFFFFF, (code >> 16) & 0x8000
        if size >= 0x47800000:  # 2^16 and all that is larger, or not a number
            rounded = np.int64(0x7E00 if size > 0x7F800000 else 0x7C00)
        elif size < 0x38800000:  # 2^-14: multiples of 2^-24 from here down
            rounded = np.int64(np.rint(abs(floats(source)[i]) * np.float32(2.0**24)))
        else:
            rounded = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
        half[i] = rounded | sign
