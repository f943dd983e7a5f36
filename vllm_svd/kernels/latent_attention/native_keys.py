"""Machine code that rebuilds keys: a product with latents whose sums are turned by RoPE at once.

Channel i of a key is paired with channel i + width / 2 in the order of packed.channels, and turned
with the angles of its position, before both leave the registers. Latents are floats, or pairs in
bf16 whose codes still lack the scales of their tiers: sums up to a tier are multiplied by the
quotient of its scale and the next one's, so that all of them lack the last alone.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_svd.kernels.latent_attention.team import TILE
from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.memory import INTEGERS, VECTOR, all_lanes, compiled, splat
from vllm_svd.kernels.native.pairs import THERE, add_products
from vllm_svd.kernels.native.products import SUMS

_WORD = ir.IntType(64)
_ROW = 4 * TILE  # bytes
_ANGLES = 4 * LANES


def turned(builder, x, y, cos, sin):
    """Channels and those they are paired with, as RoPE turns them."""
    fast = {"flags": ("contract",)}
    first = builder.fsub(builder.fmul(x, cos, **fast), builder.fmul(y, sin, **fast), **fast)
    second = builder.fadd(builder.fmul(y, cos, **fast), builder.fmul(x, sin, **fast), **fast)
    return first, second


def _block(rows, vectors, paired):
    """So many channels and the one that each is paired with, of so many vectors of tokens."""

    @intrinsic
    def rebuild(
        typingctx,
        up,
        up_stride,
        up_half,
        latents,
        spans,
        num_spans,
        quotients,
        angles,
        angles_half,
        angles_stride,
        keys,
        keys_half,
    ):
        def generate(context, builder, signature, arguments):
            up, up_stride, up_half, latents, spans, num_spans, quotients = arguments[:7]
            angles, angles_half, angles_stride, keys, keys_half = arguments[7:]

            def moved(address, offset):
                return builder.add(address, _WORD(offset) if isinstance(offset, int) else offset)

            def read(address, kind=VECTOR):
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

            starts = [builder.add(up, builder.mul(_WORD(row), up_stride)) for row in range(rows)]
            starts += [moved(start, up_half) for start in starts]
            sums = [
                [cgutils.alloca_once_value(builder, all_lanes(0.0)) for _ in range(vectors)]
                for _ in starts
            ]
            with cgutils.for_range(builder, num_spans) as span:
                ends = moved(spans, builder.mul(span.index, _WORD(16)))
                begin, end = (read(moved(ends, at), _WORD) for at in (0, 8))
                later = builder.icmp_signed("!=", span.index, _WORD(0))
                with builder.if_then(later):
                    row = moved(quotients, builder.mul(span.index, _WORD(_ROW)))
                    for v in range(vectors):
                        quotient = read(moved(row, 4 * LANES * v))
                        for totals in sums:
                            scaled = builder.fmul(builder.load(totals[v]), quotient)
                            builder.store(scaled, totals[v])
                with cgutils.for_range_slice(builder, begin, end, _WORD(1)) as (k, _):
                    row = moved(latents, builder.mul(k, _WORD(_ROW)))
                    kind = INTEGERS if paired else VECTOR
                    rights = [read(moved(row, 4 * LANES * v), kind) for v in range(vectors)]
                    at = builder.mul(k, _WORD(4))
                    for start, totals in zip(starts, sums, strict=True):
                        left = splat(builder, read(moved(start, at), kind.element))
                        for right, total in zip(rights, totals, strict=True):
                            before = builder.load(total)
                            if paired:
                                added = add_products(builder, before, left, right)
                            else:
                                product = builder.fmul(left, right, flags=("contract",))
                                added = builder.fadd(before, product, flags=("contract",))
                            builder.store(added, total)
            for row in range(rows):
                for v in range(vectors):
                    turn = moved(angles, builder.mul(_WORD(v), angles_stride))
                    turn = moved(turn, _ANGLES * row)
                    cos, sin = read(turn), read(moved(turn, angles_half))
                    x, y = builder.load(sums[row][v]), builder.load(sums[rows + row][v])
                    first, second = turned(builder, x, y, cos, sin)
                    out = moved(keys, _ROW * row + 4 * LANES * v)
                    for found, place in ((first, out), (second, moved(out, keys_half))):
                        builder.store(found, builder.inttoptr(place, VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), generate

    return rebuild


def _channels(rows, vectors, paired):
    """So many channels from i on, and those they are paired with, by the layer's strides."""
    block = _block(rows, vectors, paired)

    @compiled
    def channels(c, i, up, latents, quotients, angles, keys):
        half, stride = c.width // 2, c.up_stride_1
        up, angles, keys = up + i * stride, angles + _ANGLES * i, keys + _ROW * i
        block(
            *(up, stride, half * stride, latents, c.spans, c.num_spans, quotients),
            *(angles, _ANGLES * half, _ANGLES * c.width, keys, _ROW * half),
        )

    return channels


def _columns(vectors, paired):
    """Keys of so many vectors of tokens, all channels: as many at a time as there are sums for."""
    most = max(1, min(4, SUMS // (2 * vectors)))
    many, one = (_channels(rows, vectors, paired) for rows in (most, 1))

    @compiled
    def columns(c, up, latents, quotients, angles, keys):
        i = 0
        while i + most <= c.width // 2:
            many(c, i, up, latents, quotients, angles, keys)
            i += most
        while i < c.width // 2:
            one(c, i, up, latents, quotients, angles, keys)
            i += 1

    return columns


def _tile(paired):
    """All of a tile's vectors: as many at a time as pay."""
    wide = 4 if SUMS >= 16 else 2
    four, two, one = (_columns(min(wide, vectors), paired) for vectors in (4, 2, 1))

    @compiled
    def tile(c, up, latents, quotients, angles, keys, count):
        at = 0
        while at < count:
            part, step = count - at, 4 * at
            turned = angles + 4 * at * c.width
            if wide == 4 and part > 2 * LANES:
                four(c, up, latents + step, quotients + step, turned, keys + step)
                at += 4 * LANES
            elif part > LANES:
                two(c, up, latents + step, quotients + step, turned, keys + step)
                at += 2 * LANES
            else:
                one(c, up, latents + step, quotients + step, turned, keys + step)
                at += LANES

    return tile


# keys [width, TILE] of latents [.., TILE], `count` tokens of them, for the basis at `up`.
rebuild_keys = _tile(False)
# Never called, and yet compiled, where the CPU has no units for pairs.
rebuild_keys_of_pairs = _tile(True) if THERE else rebuild_keys
