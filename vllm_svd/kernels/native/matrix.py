"""Matrix units of CPUs with AMX: products of bf16 pairs, 16 rows by 16 columns by 16 pairs each.

Of three operands that are tiles of 16 rows of 64 bytes, registers of which there are eight: the
sums in fp32, rows of pairs, and pairs whose rows are their columns, as of tokens side by side.
"""

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.features import has

# A process must ask the kernel for the registers first; it may refuse.
THERE = has("amx-tile", "amx-bf16", "avx512bf16") and torch.cpu._init_amx()
TILE_BYTES = 64 * LANES

_BYTE, _WORD, _NOTHING = ir.IntType(8), ir.IntType(64), ir.VoidType()
_POINTER = _BYTE.as_pointer()


def _call(builder, name, *values):
    signature = ir.FunctionType(_NOTHING, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.{name}")
    builder.call(function, values)


def zero(builder, register):
    """Clear a register."""
    _call(builder, "tilezero", _BYTE(register))


def load(builder, register, address, stride):
    """16 rows of 64 bytes, `stride` bytes apart."""
    place = builder.inttoptr(address, _POINTER)
    _call(builder, "tileloadd64", _BYTE(register), place, stride)


def store(builder, register, address):
    """16 rows of 64 bytes, one behind the other."""
    place = builder.inttoptr(address, _POINTER)
    _call(builder, "tilestored64", _BYTE(register), place, _WORD(64))


def add_products(builder, sums, rows, columns):
    """Register `sums` += rows times columns."""
    _call(builder, "tdpbf16ps", _BYTE(sums), _BYTE(rows), _BYTE(columns))


# Palette 1; of eight registers the bytes of a row at 16, the rows at 48.
_SHAPES = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[LANES] * 8, *[0] * 8]


@intrinsic
def configure(typingctx):
    """All registers of this thread: whole tiles. Others configure them as they like."""

    def generate(context, builder, signature, arguments):
        shapes = ir.Constant(ir.ArrayType(_BYTE, len(_SHAPES)), _SHAPES)
        place = cgutils.global_constant(builder, "tile_shapes", shapes)
        _call(builder, "ldtilecfg", builder.bitcast(place, _POINTER))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release(typingctx):
    """Clear the registers and what configured them: nothing to save when threads are switched.

    So no other library may expect its own configuration to outlive an operator on this thread.
    """

    def generate(context, builder, signature, arguments):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate
