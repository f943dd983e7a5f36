"""Machine code of the compiled decode path: how a team of threads shares out a batch.

A thread takes one item (a KV head, a request and a part of its context) after the other until none
is left. Who finishes the last part of a request's head combines its parts.
"""

import math

import numpy as np
from numba import carray, cfunc, types

from vllm_svd.kernels.latent_attention.native_tiles import (
    add_product,
    channel,
    dot,
    exp2,
    fill,
    largest,
    rebuild,
    transpose,
)
from vllm_svd.kernels.latent_attention.team import (
    FIELDS,
    ITEMS_PER_THREAD,
    LANES,
    PLAN_COLUMNS,
    TILE,
)
from vllm_svd.kernels.native import CHUNK, TIERS
from vllm_svd.kernels.native.codec import decode
from vllm_svd.kernels.native.memory import (
    address,
    compiled,
    copy,
    count_up,
    floats,
    ints,
    narrow,
    widen,
    words,
)
from vllm_svd.kernels.native.products import times, times_rows

ARGUMENTS = np.dtype([("scale", np.float64)] + [(name, np.int64) for name in FIELDS[1:]])
COUNTS = 8 * len(FIELDS)


@compiled
def _plan(c, base):
    """Cut the requests into parts of equal length; the number of them all, and that length.

    Rows of the plan, one more for the end: row of the first query token, query tokens, tokens in
    the cache, first position that is seen, parts of the earlier requests, parts, request.
    """
    plan, chosen = ints(base), ints(c.requests)
    starts, lengths = words(c.query_start_loc), words(c.seq_lens)
    total = 0
    for i in range(c.num_requests):
        row, request = ints(base + 8 * PLAN_COLUMNS * i), chosen[i] if c.requests else i
        first, length = np.int64(starts[request]), np.int64(lengths[request])
        tokens = np.int64(starts[request + 1]) - first
        row[0], row[1], row[2] = first, tokens, length
        row[3], row[6] = max(length - tokens - c.window + 1, 0), request
        total += length - row[3]
    even = total * c.kv_heads // (c.num_threads * ITEMS_PER_THREAD) + 1
    part = (max(even, c.least_part) + TILE - 1) // TILE * TILE
    parts = 0
    for i in range(c.num_requests):
        row = ints(base + 8 * PLAN_COLUMNS * i)
        row[4], row[5] = parts, (row[2] - row[3] + part - 1) // part
        parts += row[5]
    plan[PLAN_COLUMNS * c.num_requests + 4] = parts
    return parts, part


@compiled
def _load_up(c, head, base):
    """The head's k_up, transposed, in strips [k_rank, LANES] of channels; zero where none are."""
    rank = c.k_rank
    for first in range(0, c.key_width, LANES):
        for lane in range(LANES):
            i = channel(first + lane, c.rotary_dim, c.is_neox)
            if i < c.width:
                address = c.k_up + head * c.k_up_stride_0 + i * c.k_up_stride_1
                widen(c.k_up_kind, address, rank, base + c.s_row + 4 * lane * rank)
            else:
                fill(base + c.s_row + 4 * lane * rank, rank, 0)
        transpose(base + c.s_row, rank, base + c.s_up + 4 * first * rank)


@compiled
def _load_query(c, head, first_row, tokens, base):
    """Scaled; for rebuilt keys in the order of `channel`, else in the latents' space."""
    row, scale = floats(base + c.s_row), np.float32(c.scale)
    basis, spare = c.k_up + head * c.k_up_stride_0, base + c.s_spare
    for token in range(tokens):
        for member in range(c.group):
            place = base + c.s_query + 4 * c.key_width * (token * c.group + member)
            target = floats(place)
            address = c.query + (first_row + token) * c.query_stride_0
            address += (head * c.group + member) * c.query_stride_1
            widen(c.query_kind, address, c.width, base + c.s_row)
            if c.rebuilt:
                for i in range(c.width):
                    target[i] = row[channel(i, c.rotary_dim, c.is_neox)] * scale
                for i in range(c.width, c.key_width):
                    target[i] = 0
                continue
            for i in range(c.width):
                row[i] *= scale
            if c.k_up != 0:
                kind, stride = c.k_up_kind, c.k_up_stride_1
                times_rows(base + c.s_row, basis, kind, stride, c.width, c.k_rank, place, spare)
            else:
                for i in range(c.k_rank):
                    target[i] = row[i]


@compiled
def _load_latents(c, table, group, first, count, base):
    """Key and value latents of `count` positions from `first`, page by page."""
    blocks, done, kind, stride = words(table), 0, c.cache_kind, c.cache_stride_2
    k_rank, v_rank, k_bytes = c.k_rank, c.v_rank, c.k_rank * c.cache_item
    keys, values = base + c.s_k, base + c.s_v
    while done < count:
        block, slot = divmod(first + done, c.block_size)
        address = c.cache + np.int64(blocks[block]) * c.cache_stride_0
        address += group * c.cache_stride_1 + slot * stride
        here = min(count - done, c.block_size - slot)
        for _ in range(here):
            if kind == TIERS:
                entries = address
                if address + c.slot_width + CHUNK > c.cache_end:
                    entries = base + c.s_slot
                    copy(address, c.slot_width, entries)
                decode(entries, c.k_runs, c.k_num_runs, c.scale_table, c.fp8_table, keys)
                decode(entries, c.v_runs, c.v_num_runs, c.scale_table, c.fp8_table, values)
            else:
                widen(kind, address, k_rank, keys)
                widen(kind, address + k_bytes, v_rank, values)
            address, keys, values = address + stride, keys + 4 * k_rank, values + 4 * v_rank
        done += here


@compiled
def _rebuild_keys(c, first, count, base):
    """RoPE(k_up z_k) of a tile, its channels in the order of `channel`."""
    half = c.rotary_dim // 2
    rebuild(base + c.s_k, c.k_rank, count, base + c.s_up, base + c.s_keys, c.key_width)
    cos, sin = floats(base + c.s_row), floats(base + c.s_row + 4 * half)
    for t in range(count):
        row = base + c.s_keys + 4 * t * c.key_width
        a, b = floats(row), floats(row + 4 * half)
        address = c.cos_sin + (first + t) * c.cos_sin_stride_0
        widen(c.cos_sin_kind, address, c.rotary_dim, base + c.s_row)
        for i in range(half):
            x, y = a[i], b[i]
            a[i] = x * cos[i] - y * sin[i]
            b[i] = y * cos[i] + x * sin[i]


@compiled
def _attend_tile(c, token, first, last, base):
    """Online softmax over tokens `first` to `last` of the tile for the heads of a query token."""
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    keys = base + (c.s_keys if c.rebuilt else c.s_k)
    row = token * c.group
    weights = base + c.s_weights
    for r in range(row, row + c.group):
        scores = weights + 4 * TILE * (r - row)
        dot(base + c.s_query + 4 * r * c.key_width, keys, c.key_width, first, last, scores)
        here = scores + 4 * first
        before = highest[r]
        after = largest(here, last - first, before)
        if after != before:
            # A tile of which no score is above -inf, the first: 0 times the nothing so far.
            decay = np.float32(math.exp2(before - after)) if before > -np.inf else np.float32(0)
            mixed = floats(base + c.s_mixed + 4 * r * c.v_rank)
            for i in range(c.v_rank):
                mixed[i] *= decay
            total[r] *= decay
            highest[r] = after
        shift = max(after, np.float32(-3e38))  # -inf less -inf is not a number
        total[r] += exp2(here, last - first, shift, base + c.s_power)
    mixed_rows = base + c.s_mixed + 4 * row * c.v_rank
    add_product(weights, TILE, c.group, base + c.s_v, first, last, mixed_rows, c.v_rank)


@compiled
def _combine(c, head, request, per_head, base):
    """Parts of the context of one head and request, weighed by their sums, to the output."""
    of = ints(base + 8 * PLAN_COLUMNS * request)
    first, parts = head * per_head + of[4], of[5]
    stride = 4 * c.max_rows * (c.v_rank + 2)
    result, spare = base + c.s_mixed, base + c.s_spare
    whole = floats(result)
    for row in range(of[1] * c.group):
        start = c.scratch + first * stride + 4 * row * (c.v_rank + 2)
        highest = np.float32(-np.inf)
        for part in range(parts):
            highest = max(highest, floats(start + part * stride)[0])
        fill(result, c.v_rank, 0)
        total = np.float32(0)
        for part in range(parts):
            state = floats(start + part * stride)
            mixed = floats(start + part * stride + 8)
            weight = np.float32(math.exp2(state[0] - highest))
            total += weight * state[1]
            for i in range(c.v_rank):
                whole[i] += weight * mixed[i]
        for i in range(c.v_rank):
            whole[i] /= total
        output = c.output + (of[0] + row // c.group) * c.output_stride_0
        output += (head * c.group + row % c.group) * c.output_stride_1
        if c.v_up != 0:
            basis, y = c.v_up + head * c.v_up_stride_0, base + c.s_row
            times(basis, c.v_up_kind, c.v_up_stride_1, c.v_width, c.v_rank, result, y, spare)
            narrow(c.output_kind, y, c.v_width, output)
        else:
            narrow(c.output_kind, result, c.v_rank, output)


@compiled
def _run_item(c, counts, item, head, request, per_head, part, base):
    of = ints(base + 8 * PLAN_COLUMNS * request)
    tokens, length = of[1], of[2]
    _load_query(c, head, of[0], tokens, base)
    rows = tokens * c.group
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    mixed = floats(base + c.s_mixed)
    fill(base + c.s_highest, rows, -np.inf)
    fill(base + c.s_total, rows, 0)
    fill(base + c.s_mixed, rows * c.v_rank, 0)
    begin = of[3] + (item - head * per_head - of[4]) * part
    end = min(begin + part, length)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        _load_latents(c, c.tables + of[6] * c.table_stride, head // c.shared, first, count, base)
        if c.rebuilt:
            _rebuild_keys(c, first, count, base)
        for token in range(tokens):
            position = length - tokens + token
            seen = max(position - c.window + 1 - first, 0)
            beyond = min(position + 1 - first, count)
            if seen < beyond:
                _attend_tile(c, token, seen, beyond, base)
    for row in range(rows):
        start = c.scratch + 4 * (c.v_rank + 2) * (item * c.max_rows + row)
        state, kept = floats(start), floats(start + 8)
        state[0], state[1] = highest[row], total[row]
        for i in range(c.v_rank):
            kept[i] = mixed[row * c.v_rank + i]
    finished = counts + 8 * (2 + head * c.num_requests + request)
    if count_up(finished) == of[5] - 1:
        _combine(c, head, request, per_head, base)


@compiled
def _run(c, counts):
    threads, begun = counts, counts + 8
    base = c.scratch + c.threads_scratch + count_up(threads) * c.scratch_stride
    per_head, part = _plan(c, base)
    loaded, item = -1, count_up(begun)
    while item < c.kv_heads * per_head:
        head, at = divmod(item, per_head)
        request = 0
        while at >= ints(base + 8 * PLAN_COLUMNS * (request + 1))[4]:
            request += 1
        if c.rebuilt and head != loaded:
            _load_up(c, head, base)
            loaded = head
        _run_item(c, counts, item, head, request, per_head, part, base)
        item = count_up(begun)


@cfunc(types.void(types.voidptr), fastmath=False, error_model="numpy")
def team(arguments):
    """What every thread of the team runs; `arguments` are ARGUMENTS, then counters."""
    counts = address(arguments) + COUNTS
    _run(carray(arguments, (1,), dtype=ARGUMENTS)[0], counts)
