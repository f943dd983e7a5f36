"""Machine code of the compiled decode path: how a team of threads shares out a batch.

A thread takes one item after the other until none is left: a KV head, or all that share a latent
where there is work for all threads, of a request and a part of its context. Who finishes the last
part of a request's heads combines their parts.
"""

import math

import numpy as np
from numba import carray, cfunc, types

from vllm_svd.kernels.latent_attention.native_keys import rebuild_keys, rebuild_keys_of_pairs
from vllm_svd.kernels.latent_attention.native_latents import load_latents, value_stride
from vllm_svd.kernels.latent_attention.native_tiles import cap, exp2, fill, largest, multiply
from vllm_svd.kernels.latent_attention.team import (
    ENOUGH_PER_THREAD,
    FIELDS,
    ITEMS_PER_THREAD,
    PLAN_COLUMNS,
    TILE,
)
from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.memory import (
    FLOAT32,
    address,
    compiled,
    count_up,
    floats,
    ints,
    narrow,
    whole,
    widen,
    words,
)
from vllm_svd.kernels.native.products import product, product_of_halves

ARGUMENTS = np.dtype(
    [(name, np.float64) for name in FIELDS[:2]] + [(name, np.int64) for name in FIELDS[2:]]
)
COUNTS = 8 * len(FIELDS)


@compiled
def _cut(c, base, units):
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
        # Vectors of tokens then lie in one page, where its size is one of theirs.
        row[3], row[6] = max(length - tokens - c.window + 1, 0) // LANES * LANES, request
        total += length - row[3]
    even = total * units // (c.num_threads * ITEMS_PER_THREAD) + 1
    part = (max(even, c.least_part) + TILE - 1) // TILE * TILE
    parts = 0
    for i in range(c.num_requests):
        row = ints(base + 8 * PLAN_COLUMNS * i)
        row[4], row[5] = parts, (row[2] - row[3] + part - 1) // part if row[1] else 0
        parts += row[5]
    plan[PLAN_COLUMNS * c.num_requests + 4] = parts
    return parts, part


@compiled
def _plan(c, base):
    """Parts of all requests, their length, and the heads of an item: of one latent, if enough."""
    parts, part = _cut(c, base, c.kv_heads // c.shared)
    if c.shared == 1 or parts * c.kv_heads // c.shared >= ENOUGH_PER_THREAD * c.num_threads:
        return parts, part, c.shared
    parts, part = _cut(c, base, c.kv_heads)
    return parts, part, 1


@compiled
def _query_stride(c):
    return 4 * whole(max(c.width, c.query_width, c.k_rank, c.v_width))


@compiled
def _load_query(c, head, first_row, tokens, place, base):
    """Scaled; for rebuilt keys in their order of channels, else in the latents' space."""
    row, scale, stride = floats(base + c.s_row), np.float32(c.scale), _query_stride(c)
    order, projected = ints(c.order), c.up != 0 and not c.rebuilt
    loaded = base + c.s_result if projected else place
    for token in range(tokens):
        for member in range(c.group):
            target = floats(loaded + stride * (token * c.group + member))
            source = c.query + (first_row + token) * c.query_stride_0
            source += (head * c.group + member) * c.query_stride_1
            widen(c.query_kind, source, c.query_width, base + c.s_row)
            if c.rebuilt and not c.in_order:
                for i in range(c.width):
                    target[i] = row[order[i]] * scale if order[i] >= 0 else np.float32(0)
            else:
                for i in range(c.query_width):
                    target[i] = row[i] * scale
    if projected:
        up, rows, columns = c.up + head * c.up_stride_0, tokens * c.group, whole(c.k_rank)
        width, step = c.query_width, c.up_stride_1
        product(loaded, stride, rows, up, step, 0, width, place, stride, columns, 0)


@compiled
def _score(c, head, first, count, row, rows, base):
    """Scores of a tile's tokens for so many rows of queries, from `row` on, to the weights."""
    keys, width, columns, stride = base + c.s_latents, c.k_rank, whole(count), _query_stride(c)
    queries, weights = base + c.s_query + row * stride, base + c.s_weights + 4 * TILE * row
    if c.rebuilt:
        up, keys, width = c.up + head * c.up_stride_0, base + c.s_keys, c.width
        turns = c.angles + 4 * first * c.width  # a tile begins with a vector of positions
        latents, quotients = base + c.s_latents, base + c.s_quotients
        if c.paired:
            rebuild_keys_of_pairs(c, up, latents, quotients, turns, keys, columns)
        else:
            rebuild_keys(c, up, latents, quotients, turns, keys, columns)
    product(queries, stride, rows, keys, 4 * TILE, 0, width, weights, 4 * TILE, columns, 0)
    if c.paired and c.k_num_runs:
        for i in range(rows):
            multiply(weights + 4 * TILE * i, base + c.s_scales, columns)


@compiled
def _soften(c, row, first, last, base):
    """Online softmax of the scores of tokens `first` to `last` of the tile, of one row.

    Its scores become weights; its state is made ready for their values.
    """
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    scores = base + c.s_weights + 4 * TILE * row
    if c.soft_cap > 0:
        cap(scores, TILE, np.float32(c.soft_cap))
    before = highest[row]
    after = max(largest(scores, first, last), before)
    if after != before:
        # A tile of which no score is above -inf, the first: 0 times the nothing so far.
        decay = np.float32(math.exp2(before - after)) if before > -np.inf else np.float32(0)
        mixed = floats(base + c.s_mixed + 4 * whole(c.v_rank) * row)
        for i in range(whole(c.v_rank)):
            mixed[i] *= decay
        total[row] *= decay
        highest[row] = after
    shift = max(after, np.float32(-3e38))  # -inf less -inf is not a number
    total[row] += exp2(scores, first, last, shift)


@compiled
def _mix(c, row, rows, first, last, values, base):
    """Add the values of tokens `first` to `last` of the tile, by their weights, to so many rows."""
    stride, columns, of = 4 * whole(c.v_rank), whole(c.v_rank), value_stride(c)
    weights, out = base + c.s_weights + 4 * TILE * row, base + c.s_mixed + row * stride
    if values != base + c.s_v:
        of = c.cache_stride_2
    if values == base + c.s_v or c.cache_kind == FLOAT32:
        product(weights, 4 * TILE, rows, values, of, first, last, out, stride, columns, 1)
    else:
        product_of_halves(weights, 4 * TILE, rows, values, of, first, last, out, stride, columns, 1)


@compiled
def _state(c, head, per_head, part):
    """Where a part's states of a head are kept: for each row the highest score, the sum, V."""
    return c.scratch + 4 * c.max_rows * (c.v_rank + 2) * (head * per_head + part)


@compiled
def _combine(c, head, request, per_head, base):
    """Parts of the context of one head and request, weighed by their sums, to the output."""
    of = ints(base + 8 * PLAN_COLUMNS * request)
    parts, rows = of[5], of[1] * c.group
    stride, columns = 4 * c.max_rows * (c.v_rank + 2), whole(c.v_rank)
    for row in range(rows):
        start = _state(c, head, per_head, of[4]) + 4 * row * (c.v_rank + 2)
        result = floats(base + c.s_mixed + 4 * columns * row)
        highest = np.float32(-np.inf)
        for part in range(parts):
            highest = max(highest, floats(start + part * stride)[0])
        fill(base + c.s_mixed + 4 * columns * row, c.v_rank, 0)
        total = np.float32(0)
        for part in range(parts):
            state = floats(start + part * stride)
            mixed = floats(start + part * stride + 8)
            weight = np.float32(math.exp2(state[0] - highest))
            total += weight * state[1]
            for i in range(c.v_rank):
                result[i] += weight * mixed[i]
        for i in range(c.v_rank):
            result[i] /= total
    source, source_stride, width = base + c.s_mixed, 4 * columns, c.v_rank
    if c.v_up != 0:
        up, columns, width = c.v_up + head * c.v_up_stride_0, whole(c.v_width), c.v_width
        out, out_stride = base + c.s_result, _query_stride(c)
        product(
            source, source_stride, rows, up, 4 * columns, 0, c.v_rank, out, out_stride, columns, 0
        )
        source, source_stride = out, out_stride
    for row in range(rows):
        output = c.output + (of[0] + row // c.group) * c.output_stride_0
        output += (head * c.group + row % c.group) * c.output_stride_1
        narrow(c.output_kind, source + row * source_stride, width, output)


@compiled
def _run_item(c, counts, unit, heads, request, part, per_head, length_of_part, base):
    """Heads from unit * heads on, of one latent, over a part of the context of a request."""
    of = ints(base + 8 * PLAN_COLUMNS * request)
    tokens, length, begin = of[1], of[2], of[3] + part * length_of_part
    rows, first_head, queries = tokens * c.group, unit * heads, base + c.s_query
    table = c.tables + of[6] * c.table_stride
    for i in range(heads):
        place = queries + i * rows * _query_stride(c)
        _load_query(c, first_head + i, of[0], tokens, place, base)
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    fill(base + c.s_highest, heads * rows, -np.inf)
    fill(base + c.s_total, heads * rows, 0)
    fill(base + c.s_mixed, heads * rows * whole(c.v_rank), 0)
    end = min(begin + length_of_part, length)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        values = load_latents(c, table, first_head // c.shared, first, count, base)
        for i in range(heads):
            _score(c, first_head + i, first, count, i * rows, rows, base)
        # Heads of one query token see the same: one product for all of them.
        at_once = 1 if tokens > 1 else heads
        for i in range(0, heads, at_once):
            for token in range(tokens):
                position, row = length - tokens + token, i * rows + token * c.group
                seen = max(position - c.window + 1 - first, 0)
                beyond = min(position + 1 - first, count)
                if seen < beyond:
                    for r in range(row, row + at_once * c.group):
                        _soften(c, r, seen, beyond, base)
                    _mix(c, row, at_once * c.group, seen, beyond, values, base)
    for i in range(heads):
        for row in range(rows):
            start = _state(c, first_head + i, per_head, of[4] + part) + 4 * (c.v_rank + 2) * row
            state, kept = floats(start), floats(start + 8)
            mixed = floats(base + c.s_mixed + 4 * whole(c.v_rank) * (i * rows + row))
            state[0], state[1] = highest[i * rows + row], total[i * rows + row]
            for j in range(c.v_rank):
                kept[j] = mixed[j]
    finished = counts + 8 * (2 + unit * c.num_requests + request)
    if count_up(finished) == of[5] - 1:
        for i in range(heads):
            _combine(c, first_head + i, request, per_head, base)


@compiled
def _run(c, counts):
    threads, begun = counts, counts + 8
    base = c.scratch + c.threads_scratch + count_up(threads) * c.scratch_stride
    parts, length, heads = _plan(c, base)
    item = count_up(begun)
    while item < c.kv_heads // heads * parts:
        unit, at = divmod(item, parts)
        request = 0
        while at >= ints(base + 8 * PLAN_COLUMNS * (request + 1))[4]:
            request += 1
        part = at - ints(base + 8 * PLAN_COLUMNS * request)[4]
        _run_item(c, counts, unit, heads, request, part, parts, length, base)
        item = count_up(begun)


@cfunc(types.void(types.voidptr), fastmath=False, error_model="numpy")
def team(arguments):
    """What every thread of the team runs; `arguments` are ARGUMENTS, then counters."""
    counts = address(arguments) + COUNTS
    _run(carray(arguments, (1,), dtype=ARGUMENTS)[0], counts)
