"""Machine code of the compiled decode path: how a team of threads shares out a batch.

A thread takes one item (a KV head, a request and a part of its context) after the other until none
is left. Who finishes the last part of a request's head combines its parts.
"""

import math

import numpy as np
from numba import carray, cfunc, types

from vllm_svd.kernels.latent_attention.native_tiles import (
    cap,
    channel,
    exp2,
    fill,
    largest,
    rotate,
)
from vllm_svd.kernels.latent_attention.team import FIELDS, ITEMS_PER_THREAD, PLAN_COLUMNS, TILE
from vllm_svd.kernels.native import LANES, TIERS
from vllm_svd.kernels.native.codec import decode
from vllm_svd.kernels.native.memory import (
    BFLOAT16,
    FLOAT32,
    address,
    compiled,
    copy,
    count_up,
    floats,
    ints,
    narrow,
    whole,
    widen,
    words,
)
from vllm_svd.kernels.native.products import product, product_of_halves
from vllm_svd.kernels.native.transpose import transpose

ARGUMENTS = np.dtype(
    [(name, np.float64) for name in FIELDS[:2]] + [(name, np.int64) for name in FIELDS[2:]]
)
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
        # Vectors of tokens then lie in one page, where its size is one of theirs.
        row[3], row[6] = max(length - tokens - c.window + 1, 0) // LANES * LANES, request
        total += length - row[3]
    even = total * c.kv_heads // (c.num_threads * ITEMS_PER_THREAD) + 1
    part = (max(even, c.least_part) + TILE - 1) // TILE * TILE
    parts = 0
    for i in range(c.num_requests):
        row = ints(base + 8 * PLAN_COLUMNS * i)
        row[4], row[5] = parts, (row[2] - row[3] + part - 1) // part if row[1] else 0
        parts += row[5]
    plan[PLAN_COLUMNS * c.num_requests + 4] = parts
    return parts, part


@compiled
def _load_up(c, head, base):
    """Where the head's k_up [d, k_rank] is, of rebuilt keys in the order of `channel`."""
    loaded, basis = ints(base + c.s_loaded), c.k_up + head * c.k_up_stride_0
    in_order = c.is_neox if c.rebuilt else c.k_rank % LANES == 0  # vectors of what is added up
    loaded[0], loaded[2], loaded[3] = head, basis, c.k_up_stride_1
    if c.k_up_kind == FLOAT32 and in_order:
        return
    loaded[2], loaded[3] = base + c.s_up, 4 * whole(c.k_rank)
    for i in range(c.width):
        row = channel(i, c.rotary_dim, c.is_neox) if c.rebuilt else i
        source = basis + row * c.k_up_stride_1
        widen(c.k_up_kind, source, c.k_rank, loaded[2] + i * loaded[3])


@compiled
def _load_v_up(c, head, base):
    """The head's v_up, transposed: [v_rank, d]."""
    stride, basis = 4 * whole(c.v_width), c.v_up + head * c.v_up_stride_0
    for i in range(0, c.v_width, LANES):
        source, target = basis + i * c.v_up_stride_1, base + c.s_v_up + 4 * i
        here = min(LANES, c.v_width - i)
        spare = base + c.s_slots
        transpose(source, c.v_up_kind, c.v_up_stride_1, here, c.v_rank, target, stride, spare)


@compiled
def _query_stride(c):
    return 4 * whole(max(c.width, c.k_rank, c.v_width))


@compiled
def _load_query(c, head, first_row, tokens, base):
    """Scaled; for rebuilt keys in the order of `channel`, else in the latents' space."""
    row, scale, stride = floats(base + c.s_row), np.float32(c.scale), _query_stride(c)
    projected = c.k_up != 0 and not c.rebuilt
    place = base + (c.s_result if projected else c.s_query)
    for token in range(tokens):
        for member in range(c.group):
            target = floats(place + stride * (token * c.group + member))
            source = c.query + (first_row + token) * c.query_stride_0
            source += (head * c.group + member) * c.query_stride_1
            widen(c.query_kind, source, c.width, base + c.s_row)
            if c.rebuilt:
                for i in range(c.width):
                    target[i] = row[channel(i, c.rotary_dim, c.is_neox)] * scale
            else:
                for i in range(c.width):
                    target[i] = row[i] * scale
    if projected:
        loaded, rows, columns = ints(base + c.s_loaded), tokens * c.group, whole(c.k_rank)
        up, up_stride, out = loaded[2], loaded[3], base + c.s_query
        product(place, stride, rows, up, up_stride, 0, c.width, out, stride, columns, 0)


@compiled
def _value_stride(c):
    return 4 * (whole(c.v_rank) + LANES)  # decoding writes beyond a row


@compiled
def _load_slots(c, source, count, keys, values, base):
    """Latents of so many neighbouring slots; the keys as rows only where they have tiers."""
    k_stride, v_stride = 4 * (whole(c.k_rank) + LANES), _value_stride(c)
    stride = c.cache_stride_2
    if c.cache_kind != TIERS:
        for t in range(count):
            entry = source + t * stride + c.k_rank * c.cache_item
            widen(c.cache_kind, entry, c.v_rank, values + t * v_stride)
        return
    if source + (count - 1) * stride + c.slot_width + LANES > c.cache_end:
        for t in range(count):
            slot = base + c.s_slot
            copy(source + t * stride, c.slot_width, slot)
            key, value = keys + t * k_stride, values + t * v_stride
            decode(slot, 0, 1, c.k_runs, c.k_num_runs, c.scale_table, key, k_stride)
            decode(slot, 0, 1, c.v_runs, c.v_num_runs, c.scale_table, value, v_stride)
        return
    decode(source, stride, count, c.k_runs, c.k_num_runs, c.scale_table, keys, k_stride)
    decode(source, stride, count, c.v_runs, c.v_num_runs, c.scale_table, values, v_stride)


@compiled
def _load_latents(c, table, group, first, count, base):
    """Of `count` positions from `first` the key latents, transposed; address of the value latents.

    That is in the page where they can be read there.
    """
    blocks, kind, stride, spare = words(table), c.cache_kind, c.cache_stride_2, base + c.s_slots
    k_stride, in_place = 4 * (whole(c.k_rank) + LANES), base + c.s_v
    for done in range(0, count, LANES):
        here, target = min(LANES, count - done), base + c.s_latents + 4 * done
        values = base + c.s_v + done * _value_stride(c)
        block, slot = divmod(first + done, c.block_size)
        page = c.cache + np.int64(blocks[block]) * c.cache_stride_0 + group * c.cache_stride_1
        source, begin = page + slot * stride, 0
        in_page = c.v_rank % LANES == 0 and slot + count <= c.block_size
        if done == 0 and kind in (FLOAT32, BFLOAT16) and in_page:
            in_place = source + c.k_rank * c.cache_item
        if kind != TIERS and slot + here <= c.block_size:
            if in_place == base + c.s_v:
                _load_slots(c, source, here, spare, values, base)
            transpose(source, kind, stride, here, c.k_rank, target, 4 * TILE, spare)
            continue
        while begin < here:  # one page after the other
            within = min(here - begin, c.block_size - slot)
            key, value = spare + begin * k_stride, values + begin * _value_stride(c)
            _load_slots(c, source, within, key, value, base)
            if kind != TIERS:
                for t in range(within):
                    widen(kind, source + t * stride, c.k_rank, key + t * k_stride)
            begin, block, slot = begin + within, block + 1, 0
            if begin < here:
                source = c.cache + np.int64(blocks[block]) * c.cache_stride_0
                source += group * c.cache_stride_1
        # Rows of the spare are read past `here`, and ignored.
        columns = whole(c.k_rank)
        transpose(spare, FLOAT32, k_stride, LANES, columns, target, 4 * TILE, spare)
    return in_place


@compiled
def _rebuild_keys(c, first, count, base):
    """RoPE(k_up z_k) of a tile [d, TILE], its channels in the order of `channel`."""
    keys, columns = base + c.s_keys, whole(count)
    loaded, latents = ints(base + c.s_loaded), base + c.s_latents
    up, stride = loaded[2], loaded[3]
    product(up, stride, c.width, latents, 4 * TILE, 0, c.k_rank, keys, 4 * TILE, columns, 0)
    for done in range(0, count, LANES):
        here, angles = min(LANES, count - done), base + c.s_angles + 4 * done
        source, spare = c.cos_sin + (first + done) * c.cos_sin_stride_0, base + c.s_slots
        kind, stride = c.cos_sin_kind, c.cos_sin_stride_0
        transpose(source, kind, stride, here, c.rotary_dim, angles, 4 * TILE, spare)
    rotate(keys, c.rotary_dim // 2, base + c.s_angles, columns)


@compiled
def _mix(c, token, first, last, values, base):
    """Online softmax of the scores of tokens `first` to `last` of the tile, for one query token."""
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    row, stride = token * c.group, 4 * whole(c.v_rank)
    for r in range(row, row + c.group):
        scores = base + c.s_weights + 4 * TILE * r
        if c.soft_cap > 0:
            cap(scores, TILE, np.float32(c.soft_cap))
        before = highest[r]
        after = max(largest(scores, first, last), before)
        if after != before:
            # A tile of which no score is above -inf, the first: 0 times the nothing so far.
            decay = np.float32(math.exp2(before - after)) if before > -np.inf else np.float32(0)
            mixed = floats(base + c.s_mixed + r * stride)
            for i in range(whole(c.v_rank)):
                mixed[i] *= decay
            total[r] *= decay
            highest[r] = after
        shift = max(after, np.float32(-3e38))  # -inf less -inf is not a number
        total[r] += exp2(scores, first, last, shift)
    weights, out = base + c.s_weights + 4 * TILE * row, base + c.s_mixed + row * stride
    group, columns, of = c.group, whole(c.v_rank), _value_stride(c)
    if values != base + c.s_v:
        of = c.cache_stride_2
    if values == base + c.s_v or c.cache_kind == FLOAT32:
        product(weights, 4 * TILE, group, values, of, first, last, out, stride, columns, 1)
    else:
        product_of_halves(
            weights, 4 * TILE, group, values, of, first, last, out, stride, columns, 1
        )


@compiled
def _combine(c, head, request, per_head, base):
    """Parts of the context of one head and request, weighed by their sums, to the output."""
    of, loaded = ints(base + 8 * PLAN_COLUMNS * request), ints(base + c.s_loaded)
    first, parts, rows = head * per_head + of[4], of[5], of[1] * c.group
    stride, columns = 4 * c.max_rows * (c.v_rank + 2), whole(c.v_rank)
    for row in range(rows):
        start = c.scratch + first * stride + 4 * row * (c.v_rank + 2)
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
        if loaded[1] != head:
            _load_v_up(c, head, base)
            loaded[1] = head
        up, columns, width = base + c.s_v_up, whole(c.v_width), c.v_width
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
def _run_item(c, counts, item, head, request, per_head, part, base):
    of = ints(base + 8 * PLAN_COLUMNS * request)
    tokens, length = of[1], of[2]
    _load_query(c, head, of[0], tokens, base)
    rows = tokens * c.group
    highest, total = floats(base + c.s_highest), floats(base + c.s_total)
    fill(base + c.s_highest, rows, -np.inf)
    fill(base + c.s_total, rows, 0)
    fill(base + c.s_mixed, rows * whole(c.v_rank), 0)
    begin = of[3] + (item - head * per_head - of[4]) * part
    end = min(begin + part, length)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        table = c.tables + of[6] * c.table_stride
        values = _load_latents(c, table, head // c.shared, first, count, base)
        keys, width = base + c.s_latents, c.k_rank
        if c.rebuilt:
            _rebuild_keys(c, first, count, base)
            keys, width = base + c.s_keys, c.width
        queries, weights, columns = base + c.s_query, base + c.s_weights, whole(count)
        stride = _query_stride(c)
        product(queries, stride, rows, keys, 4 * TILE, 0, width, weights, 4 * TILE, columns, 0)
        for token in range(tokens):
            position = length - tokens + token
            seen = max(position - c.window + 1 - first, 0)
            beyond = min(position + 1 - first, count)
            if seen < beyond:
                _mix(c, token, seen, beyond, values, base)
    for row in range(rows):
        start = c.scratch + 4 * (c.v_rank + 2) * (item * c.max_rows + row)
        state, kept = floats(start), floats(start + 8)
        mixed = floats(base + c.s_mixed + 4 * whole(c.v_rank) * row)
        state[0], state[1] = highest[row], total[row]
        for i in range(c.v_rank):
            kept[i] = mixed[i]
    finished = counts + 8 * (2 + head * c.num_requests + request)
    if count_up(finished) == of[5] - 1:
        _combine(c, head, request, per_head, base)


@compiled
def _run(c, counts):
    threads, begun = counts, counts + 8
    base = c.scratch + c.threads_scratch + count_up(threads) * c.scratch_stride
    per_head, part = _plan(c, base)
    loaded, item = ints(base + c.s_loaded), count_up(begun)
    loaded[0] = loaded[1] = -1  # the heads whose k_up and v_up are at hand
    while item < c.kv_heads * per_head:
        head, at = divmod(item, per_head)
        request = 0
        while at >= ints(base + 8 * PLAN_COLUMNS * (request + 1))[4]:
            request += 1
        if c.k_up != 0 and head != loaded[0]:
            _load_up(c, head, base)
        _run_item(c, counts, item, head, request, per_head, part, base)
        item = count_up(begun)


@cfunc(types.void(types.voidptr), fastmath=False, error_model="numpy")
def team(arguments):
    """What every thread of the team runs; `arguments` are ARGUMENTS, then counters."""
    counts = address(arguments) + COUNTS
    _run(carray(arguments, (1,), dtype=ARGUMENTS)[0], counts)
