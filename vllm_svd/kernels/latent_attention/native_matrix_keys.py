"""Machine code that rebuilds keys by matrix units, where the CPU has them: see native_keys.

Sums of each tier leave the registers by themselves; they are scaled, added up and turned by RoPE in
the vectors of 16 tokens that they are.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.latent_attention.native_keys import turned
from vllm_svd.kernels.latent_attention.team import TILE
from vllm_svd.kernels.native import LANES, matrix
from vllm_svd.kernels.native.memory import VECTOR, compiled, ints

_WORD = ir.IntType(64)
_ROW = 4 * TILE  # bytes of a row of latents, keys and quotients
_FAST = {"flags": ("contract",)}
# Registers: the sums of 16 channels and of those they are paired with, their bases, latents.
_SUMS, _BASES, _LATENTS = (0, 1), (2, 3), 4


@intrinsic
def _multiply(typingctx, up, up_stride, up_half, latents, chunks, sums):
    """sums [2, 16, 16] of 16 channels at `up` and their partners with so many chunks of pairs."""

    def generate(context, builder, signature, arguments):
        up, up_stride, up_half, latents, chunks, sums = arguments
        for register in _SUMS:
            matrix.zero(builder, register)
        with cgutils.for_range(builder, chunks) as chunk:
            first = builder.add(up, builder.mul(chunk.index, _WORD(4 * LANES)))
            places = (first, builder.add(first, up_half))
            rows = builder.add(latents, builder.mul(chunk.index, _WORD(LANES * _ROW)))
            matrix.load(builder, _LATENTS, rows, _WORD(_ROW))
            for register, basis, place in zip(_SUMS, _BASES, places, strict=True):
                matrix.load(builder, basis, place, up_stride)
                matrix.add_products(builder, register, basis, _LATENTS)
        for number, register in enumerate(_SUMS):
            place = builder.add(sums, _WORD(matrix.TILE_BYTES * number))
            matrix.store(builder, register, place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def _turn(typingctx, sums, spans, quotients, angles, angles_half, keys, keys_half):
    """keys of 16 channels and their partners: sums of the tiers, scaled and turned."""

    def generate(context, builder, signature, arguments):
        sums, spans, quotients, angles, angles_half, keys, keys_half = arguments

        def at(address, index, stride):
            moved = builder.add(address, builder.mul(index, _WORD(stride)))
            return builder.inttoptr(moved, VECTOR.as_pointer())

        def read(address, index, stride):
            return builder.load(at(address, index, stride), align=4)

        with cgutils.for_range(builder, _WORD(LANES)) as row:
            row, tile = row.index, _WORD(matrix.TILE_BYTES)
            of = [sums, builder.add(sums, tile)]
            both = [cgutils.alloca_once_value(builder, read(s, row, 4 * LANES)) for s in of]
            with cgutils.for_range_slice(builder, _WORD(1), spans, _WORD(1)) as (span, _):
                quotient = read(quotients, span, _ROW)
                for start, total in zip(of, both, strict=True):
                    start = builder.add(start, builder.mul(span, _WORD(2 * matrix.TILE_BYTES)))
                    scaled = builder.fmul(builder.load(total), quotient, **_FAST)
                    more = read(start, row, 4 * LANES)
                    builder.store(builder.fadd(scaled, more, **_FAST), total)
            x, y = (builder.load(total) for total in both)
            cos = read(angles, row, 4 * LANES)
            sin = read(builder.add(angles, angles_half), row, 4 * LANES)
            first, second = turned(builder, x, y, cos, sin)
            builder.store(first, at(keys, row, _ROW), align=4)
            builder.store(second, at(builder.add(keys, keys_half), row, _ROW), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@compiled
def _rebuild(c, up, latents, quotients, angles, keys, count, sums):
    """keys [width, TILE] of latents [.., TILE], `count` tokens of them, for the basis at `up`.

    Of whole tiles: the bases of each tier are padded with zeros, which meet the latents that follow
    it. The last channels are made twice where half the width is no multiple of 16.
    """
    half, stride, spans = c.width // 2, c.up_stride_1, ints(c.spans)
    of_block = 2 * c.num_spans * matrix.TILE_BYTES
    matrix.configure()
    for token in range(0, count, LANES):
        for block in range((half + LANES - 1) // LANES):
            i = min(LANES * block, half - LANES)
            columns, to = up + i * stride, sums + of_block * block
            for span in range(c.num_spans):
                begin, end = spans[2 * span], spans[2 * span + 1]
                chunks = (end - begin + LANES - 1) // LANES
                rows = latents + begin * _ROW + 4 * token
                _multiply(columns, stride, half * stride, rows, chunks, to)
                columns += 4 * LANES * chunks
                to += 2 * matrix.TILE_BYTES
        for block in range((half + LANES - 1) // LANES):  # no product is waited for
            i = min(LANES * block, half - LANES)
            turns, out = angles + 4 * (token * c.width + LANES * i), keys + _ROW * i + 4 * token
            _turn(
                *(sums + of_block * block, c.num_spans, quotients + 4 * token),
                *(turns, 4 * LANES * half, out, _ROW * half),
            )
    matrix.release()


@compiled
def _nothing(c, up, latents, quotients, angles, keys, count, sums):
    """Where there are no such units, nothing of this is even compiled."""


rebuild_keys_by_matrix = _rebuild if matrix.THERE else _nothing
