"""Machine code that reads a tile's latents from its pages: keys transposed, values as rows."""

import numpy as np

from vllm_svd.kernels.latent_attention.native_tiles import fill
from vllm_svd.kernels.latent_attention.team import TILE
from vllm_svd.kernels.native import LANES, TIERS
from vllm_svd.kernels.native.codec import decode
from vllm_svd.kernels.native.memory import (
    BFLOAT16,
    FLOAT32,
    compiled,
    copy,
    floats,
    ints,
    octets,
    prefetch,
    widen,
    words,
)
from vllm_svd.kernels.native.pairs import decode_pairs
from vllm_svd.kernels.native.spread import decode_spread
from vllm_svd.kernels.native.transpose import transpose_halves, transpose_words


@compiled
def _page(c, table, group, block):
    """Where a group's slots of a block begin."""
    page = np.int64(words(table)[block])
    return c.cache + page * c.cache_stride_0 + group * c.cache_stride_1


@compiled
def _slots(c, table, group, position, used, base):
    """Address and stride of LANES slots from a position on, `used` of which are those of tokens.

    Those in the page, unless they go on in the next one or what is read would not be memory.
    """
    stride = c.cache_stride_2
    block, slot = divmod(position, c.block_size)
    source = _page(c, table, group, block) + slot * stride
    if slot + LANES <= c.block_size and source + (LANES - 1) * stride + c.reads <= c.cache_end:
        return source, stride
    for t in range(used):
        copy(source, c.slot_bytes, base + c.s_slots + t * c.slot_stride)
        slot, source = slot + 1, source + stride
        if slot == c.block_size and t + 1 < used:
            block, slot = block + 1, 0
            source = _page(c, table, group, block)
    return base + c.s_slots, c.slot_stride


@compiled
def _scales(c, source, stride, done, base):
    """Quotients of the scales of neighbouring tiers, from the second on, and the last scales."""
    table, before = floats(c.scale_table), floats(base + c.s_scales + 4 * done)
    for run in range(c.k_num_runs):
        at, of = source + ints(c.k_runs + 40 * run)[4], floats(base + c.s_quotients)
        for t in range(LANES):
            scale = table[np.int64(octets(at + t * stride)[0])]
            of[run * TILE + done + t] = before[t] / scale
            before[t] = scale


@compiled
def _load_keys(c, source, stride, used, done, base):
    """Transposed, tokens from `done` on of the tile."""
    target, rows = base + c.s_latents + 4 * done, base + c.s_rows
    if c.paired and c.cache_kind == TIERS:
        transpose_words(source, stride, c.key_words, base + c.s_words, 4 * LANES)
        decode_pairs(base + c.s_words, c.k_runs, c.k_num_runs, target, 4 * TILE)
        _scales(c, source, stride, done, base)
    elif c.paired or c.cache_kind == FLOAT32:
        transpose_words(source, stride, c.key_words, target, 4 * TILE)
    elif c.cache_kind == BFLOAT16:
        transpose_halves(source, stride, c.k_rank, target, 4 * TILE)
    else:
        row = c.key_stride
        if c.cache_kind == TIERS:
            decode(source, stride, used, c.k_runs, c.k_num_runs, c.scale_table, rows, row)
        else:
            for t in range(used):
                widen(c.cache_kind, source + t * stride, c.k_rank, rows + t * row)
        transpose_words(rows, row, c.k_rank, target, 4 * TILE)
    if c.by_matrix:  # what zeros of the padded bases meet must be numbers
        for row in range(c.num_pairs, c.num_pairs + LANES - 1):
            fill(target + 4 * TILE * row, LANES, 0)


@compiled
def _load_values(c, source, stride, used, target, spare):
    row = c.value_stride
    if c.v_vectors:
        runs, begins, tables, vectors = c.v_runs, c.v_begins, c.v_tables, c.v_vectors
        decode_spread(source, stride, used, runs, begins, tables, vectors, target, row, spare)
        return
    if c.cache_kind == TIERS:
        decode(source, stride, used, c.v_runs, c.v_num_runs, c.scale_table, target, row)
        return
    for t in range(used):
        entry = source + t * stride + c.k_rank * c.cache_item
        widen(c.cache_kind, entry, c.v_rank, target + t * row)


@compiled
def load_latents(c, table, group, first, count, end, base):
    """Of `count` positions from `first` the key latents; address of the value latents.

    Those of the next tile, before `end`, are asked for: they come while this one is computed.

    That is in the page where they can be read there, in the cache's dtype. Lanes of the last vector
    that are no tokens may hold anything.
    """
    values, (block, slot) = base + c.s_v, divmod(first, c.block_size)
    as_they_are = c.cache_kind == FLOAT32 or c.cache_kind == BFLOAT16
    if as_they_are and c.v_rank % LANES == 0 and slot + count <= c.block_size:
        page = _page(c, table, group, block)
        values = page + slot * c.cache_stride_2 + c.k_rank * c.cache_item
    for done in range(0, count, LANES):
        used = min(LANES, count - done)
        ahead = first + done + TILE
        if ahead < end:
            block, slot = divmod(ahead, c.block_size)
            later = _page(c, table, group, block) + slot * c.cache_stride_2
            prefetch(later, LANES * c.slot_bytes)
        source, stride = _slots(c, table, group, first + done, used, base)
        _load_keys(c, source, stride, used, done, base)
        if values == base + c.s_v:
            target = values + done * c.value_stride
            _load_values(c, source, stride, used, target, base + c.s_rows)
    return values
