"""Machine code of the compiled attention: how a team of threads shares out a batch.

Query tokens of a request are taken in runs, for which keys are rebuilt once. A thread takes one
item after the other until none is left: a KV head, or all that share a latent where there is work
for all threads, of a run and a part of what it sees. Who finishes the last part combines them.
"""

import math

import numpy as np
from numba import carray

from vllm_svd.kernels.latent_attention.native_keys import rebuild_keys, rebuild_keys_of_pairs
from vllm_svd.kernels.latent_attention.native_latents import load_latents
from vllm_svd.kernels.latent_attention.native_matrix_keys import rebuild_keys_by_matrix
from vllm_svd.kernels.latent_attention.native_tiles import cap, exp2, fill, largest, multiply
from vllm_svd.kernels.latent_attention.team import (
    ENOUGH_PER_THREAD,
    FIELDS,
    ITEMS_PER_THREAD,
    PLAN_COLUMNS,
    TILE,
    TOKENS_AT_ONCE,
)
from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.entry import entry
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
    """Cut query tokens into runs, and what they see into parts of equal length; both numbers.

    Rows of the plan, one more for the end: row of the first query token, query tokens, tokens that
    the last one sees, the first of them that any sees, parts of the earlier runs, parts, request,
    states of the earlier runs, which those of several parts have.
    """
    starts, lengths, runs, total = words(c.query_start_loc), words(c.seq_lens), 0, 0
    for request in range(c.num_requests):
        first, after = np.int64(starts[request]), np.int64(starts[request + 1])
        for begin in range(first, after, c.query_block):
            row, tokens = ints(base + 8 * PLAN_COLUMNS * runs), min(c.query_block, after - begin)
            end = np.int64(lengths[request]) - (after - begin - tokens)
            row[0], row[1], row[2], row[6] = begin, tokens, end, request
            # Vectors of tokens then lie in one page, where its size is one of theirs.
            row[3] = max(end - tokens - c.window + 1, 0) // LANES * LANES
            total += end - row[3]
            runs += 1
    even = total * units // (c.num_threads * ITEMS_PER_THREAD) + 1
    part = (max(even, c.least_part) + TILE - 1) // TILE * TILE
    parts = states = 0
    for run in range(runs):
        row = ints(base + 8 * PLAN_COLUMNS * run)
        row[4], row[5], row[7] = parts, (row[2] - row[3] + part - 1) // part, states
        parts += row[5]
        states += row[5] if row[5] > 1 else 0
    ints(base + 8 * PLAN_COLUMNS * runs)[4] = parts
    return parts, part


@compiled
def _plan(c, base):
    """Parts of all runs, their length, and the heads of an item: of one latent, if enough."""
    parts, part = _cut(c, base, c.kv_heads // c.shared)
    if c.shared == 1 or parts * c.kv_heads // c.shared >= ENOUGH_PER_THREAD * c.num_threads:
        return parts, part, c.shared
    parts, part = _cut(c, base, c.kv_heads)
    return parts, part, 1


@compiled
def _load_query(c, head, first_row, tokens, place, base):
    """Scaled; for rebuilt keys in their order of channels, else in the latents' space."""
    row, scale, stride = floats(base + c.s_row), np.float32(c.scale), c.query_stride
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
    keys, width, columns, stride = base + c.s_latents, c.k_rank, whole(count), c.query_stride
    queries, weights = base + c.s_query + row * stride, base + c.s_weights + 4 * TILE * row
    if c.rebuilt:
        up, keys, width = c.up + head * c.up_stride_0, base + c.s_keys, c.width
        turns = c.angles + 4 * first * c.width  # a tile begins with a vector of positions
        latents, quotients = base + c.s_latents, base + c.s_quotients
        if c.by_matrix:
            sums = base + c.s_sums
            rebuild_keys_by_matrix(c, up, latents, quotients, turns, keys, columns, sums)
        elif c.paired:
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
def _seen(c, length, tokens, token, first, count):
    """Which tokens of a tile a query token sees: from, and before."""
    position = length - tokens + token
    return max(position - c.window + 1 - first, 0), min(position + 1 - first, count)


@compiled
def _mix(c, row, rows, first, last, values, base):
    """Add the values of tokens `first` to `last` of the tile, by their weights, to so many rows."""
    stride, columns, of = 4 * whole(c.v_rank), whole(c.v_rank), c.value_stride
    weights, out = base + c.s_weights + 4 * TILE * row, base + c.s_mixed + row * stride
    if values != base + c.s_v:
        of = c.cache_stride_2
    if values == base + c.s_v or c.cache_kind == FLOAT32:
        product(weights, 4 * TILE, rows, values, of, first, last, out, stride, columns, 1)
    else:
        product_of_halves(weights, 4 * TILE, rows, values, of, first, last, out, stride, columns, 1)


@compiled
def _weigh(c, length, tokens, token, beyond, row, rows, first, count, values, base):
    """Weights, and values mixed by them, of query tokens `token` to `beyond`, in so many rows.

    No row ever meets a value that its token does not see, which may not be finite.
    """
    of_token = rows // (beyond - token)
    begin, _ = _seen(c, length, tokens, beyond - 1, first, count)
    _, end = _seen(c, length, tokens, token, first, count)
    if begin < end:  # what all of them see
        for r in range(rows):
            seen, last = _seen(c, length, tokens, token + r // of_token, first, count)
            _soften(c, row + r, seen, last, base)
        _mix(c, row, rows, begin, end, values, base)
    for one in range(token, beyond):
        seen, last = _seen(c, length, tokens, one, first, count)
        at = row + (one - token) * of_token
        if begin < end:
            if seen < begin:
                _mix(c, at, of_token, seen, begin, values, base)
            if end < last:
                _mix(c, at, of_token, end, last, values, base)
        elif seen < last:
            for r in range(of_token):
                _soften(c, at + r, seen, last, base)
            _mix(c, at, of_token, seen, last, values, base)


@compiled
def _state(c, head, index):
    """Where the states of a part of a head are kept: for each row the highest score, the sum, V."""
    return c.scratch + 4 * c.max_rows * (c.v_rank + 2) * (head * c.max_states + index)


@compiled
def _keep(c, head, index, row, rows, base):
    """Keep the states of a part, which are in rows from `row` on."""
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    for r in range(rows):
        start = _state(c, head, index) + 4 * (c.v_rank + 2) * r
        state, kept = floats(start), floats(start + 8)
        mixed = floats(base + c.s_mixed + 4 * whole(c.v_rank) * (row + r))
        state[0], state[1] = highest[row + r], total[row + r]
        for i in range(c.v_rank):
            kept[i] = mixed[i]


@compiled
def _combine(c, head, index, parts, row, rows, base):
    """The states of all parts, weighed by their sums, as one in rows from `row` on."""
    total, stride = floats(base + c.s_total), 4 * c.max_rows * (c.v_rank + 2)
    for r in range(rows):
        start = _state(c, head, index) + 4 * r * (c.v_rank + 2)
        place = base + c.s_mixed + 4 * whole(c.v_rank) * (row + r)
        result, highest = floats(place), np.float32(-np.inf)
        for part in range(parts):
            highest = max(highest, floats(start + part * stride)[0])
        fill(place, c.v_rank, 0)
        total[row + r] = np.float32(0)
        for part in range(parts):
            state = floats(start + part * stride)
            mixed = floats(start + part * stride + 8)
            weight = np.float32(math.exp2(state[0] - highest))
            total[row + r] += weight * state[1]
            for i in range(c.v_rank):
                result[i] += weight * mixed[i]


@compiled
def _finish(c, head, first_row, row, rows, base):
    """Write what rows from `row` on have mixed to the output, from its row `first_row` on."""
    total, columns = floats(base + c.s_total), whole(c.v_rank)
    source, source_stride, width = base + c.s_mixed + 4 * columns * row, 4 * columns, c.v_rank
    for r in range(rows):
        result = floats(source + r * source_stride)
        for i in range(c.v_rank):
            result[i] /= total[row + r]
    if c.v_up != 0:
        up, columns, width = c.v_up + head * c.v_up_stride_0, whole(c.v_width), c.v_width
        out, out_stride = base + c.s_result, c.query_stride
        product(
            source, source_stride, rows, up, 4 * columns, 0, c.v_rank, out, out_stride, columns, 0
        )
        source, source_stride = out, out_stride
    for r in range(rows):
        output = c.output + (first_row + r // c.group) * c.output_stride_0
        output += (head * c.group + r % c.group) * c.output_stride_1
        narrow(c.output_kind, source + r * source_stride, width, output)


@compiled
def _run_item(c, counts, unit, heads, run, part, length_of_part, base):
    """Heads from unit * heads on, of one latent, over a part of what a run sees."""
    of = ints(base + 8 * PLAN_COLUMNS * run)
    tokens, length, begin = of[1], of[2], of[3] + part * length_of_part
    rows, first_head, queries = tokens * c.group, unit * heads, base + c.s_query
    table = c.tables + of[6] * c.table_stride
    for i in range(heads):
        place = queries + i * rows * c.query_stride
        _load_query(c, first_head + i, of[0], tokens, place, base)
    fill(base + c.s_highest, heads * rows, -np.inf)
    fill(base + c.s_total, heads * rows, 0)
    fill(base + c.s_mixed, heads * rows * whole(c.v_rank), 0)
    end = min(begin + length_of_part, length)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        values = load_latents(c, table, first_head // c.shared, first, count, end, base)
        for i in range(heads):
            _score(c, first_head + i, first, count, i * rows, rows, base)
        if tokens == 1:  # heads see the same
            _weigh(c, length, 1, 0, 1, 0, heads * rows, first, count, values, base)
            continue
        for i in range(heads):
            for token in range(0, tokens, TOKENS_AT_ONCE):
                beyond, row = min(token + TOKENS_AT_ONCE, tokens), i * rows + token * c.group
                here = (beyond - token) * c.group
                _weigh(c, length, tokens, token, beyond, row, here, first, count, values, base)
    if of[5] > 1:
        for i in range(heads):
            _keep(c, first_head + i, of[7] + part, i * rows, rows, base)
        if count_up(counts + 8 * (2 + unit * c.max_runs + run)) < of[5] - 1:
            return
        for i in range(heads):
            _combine(c, first_head + i, of[7], of[5], i * rows, rows, base)
    for i in range(heads):
        _finish(c, first_head + i, of[0], i * rows, rows, base)


@compiled
def _run(c, counts):
    threads, begun = counts, counts + 8
    base = c.scratch + c.threads_scratch + count_up(threads) * c.scratch_stride
    parts, length, heads = _plan(c, base)
    item = count_up(begun)
    while item < c.kv_heads // heads * parts:
        unit, at = divmod(item, parts)
        at, run = parts - 1 - at, 0  # the last runs of a prompt see most
        while at >= ints(base + 8 * PLAN_COLUMNS * (run + 1))[4]:
            run += 1
        part = at - ints(base + 8 * PLAN_COLUMNS * run)[4]
        _run_item(c, counts, unit, heads, run, part, length, base)
        item = count_up(begun)


@entry
def team(arguments):
    """What every thread of the team runs; `arguments` are ARGUMENTS, then counters."""
    counts = address(arguments) + COUNTS
    _run(carray(arguments, (1,), dtype=ARGUMENTS)[0], counts)
