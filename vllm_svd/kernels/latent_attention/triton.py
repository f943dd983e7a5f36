"""latent_attention on CUDA: one program per block of query rows and KV head, keys in tiles.

All query heads of a KV head share each tile, so a rebuilt key is used by the whole group. Keys are
rebuilt in two half-rotary products, whose rows of k_up are gathered by the rotary pairing; channels
beyond rotary_dim form a third product.

Scores are [keys, query rows] and outputs [channels, query rows]: the many rows of a product are
keys or channels, as tensor cores want them, its few columns the queries of a decode step, and
rebuilt keys go on from the registers they are in.

A latent is read in parts (latent_tiers_triton). What keys and queries meet is cut alike, and each
part has its own accumulator of the output, so that no channels need be interleaved. Codes are
multiplied as the small numbers they are. Of a key, each tier's scale is brought in as the quotient
to the next one's, the last one in the scores; those of values go to the weights.

Where a step has too few programs for the device, contexts are split and combined (split_triton).
"""

import torch
import triton
import triton.language as tl

from vllm_svd.kernels.latent_attention import split_triton, tiles_triton
from vllm_svd.kernels.latent_attention.parts_triton import (
    load_query,
    load_up,
    store_output,
    zeros,
)
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_tiers_triton import (
    SHIFT,
    load_scale,
    load_values,
    padded,
    parts_of,
    scale_table,
)
from vllm_svd.kernels.paged_batch import PagedBatch, Rope

# Query rows of a program, all heads of a KV head counted: of decode steps, and of all others, whose
# requests may yet decode, too.
FEW_ROWS, MORE_ROWS = 8, 16


@triton.jit
def _request_of(query_start_ptr, block, requests, BLOCK_Q: tl.constexpr):
    """The request that owns a query block: blocks of request i start at start // BLOCK_Q + i."""
    left = 0
    right = requests
    while left < right:
        middle = (left + right) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= block:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def _tanh(x):
    """tl has none. Near zero 1 - exp(-2 x) would cancel: there it is the series, exact to fp32."""
    size = tl.abs(x)
    near = tl.minimum(size, 0.2)
    square = near * near
    series = near * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    decay = tl.exp(-2 * size)
    found = tl.where(size < 0.2, series, (1 - decay) / (1 + decay))
    return tl.where(x < 0, -found, found)


@triton.jit(do_not_specialize=["requests", "splits"])
def _attention_kernel(
    query_ptr,
    cache_ptr,
    output_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_table_ptr,
    k_up_ptr,
    cos_sin_ptr,
    scales_ptr,
    requests,
    splits,
    scale,
    query_token_stride,
    query_head_stride,
    output_split_stride,
    output_token_stride,
    output_head_stride,
    table_stride,
    up_head_stride,
    up_row_stride,
    cos_stride,
    cache_block_stride: tl.constexpr,
    cache_head_stride: tl.constexpr,
    cache_slot_stride: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr,
    K_SLICES: tl.constexpr,
    V_SLICES: tl.constexpr,
    REBUILD: tl.constexpr,
    NEOX: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    PASSED: tl.constexpr,
    PASSED_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    V_RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST_PART: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    request = _request_of(query_start_ptr, block, requests, BLOCK_Q)
    query_start = tl.load(query_start_ptr + request)
    query_length = tl.load(query_start_ptr + request + 1) - query_start
    first = (block - (query_start // BLOCK_Q + request)) * BLOCK_Q
    if first >= query_length:
        return
    seq_len = tl.load(seq_lens_ptr + request)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (row < BLOCK_Q * GROUP) & (token < query_length)
    query_row = (
        query_ptr
        + (query_start + token).to(tl.int64) * query_token_stride
        + head * query_head_stride
    )
    position = seq_len - query_length + token

    dtype: tl.constexpr = query_ptr.dtype.element_ty
    if REBUILD:
        half = tl.arange(0, HALF_PADDED)
        in_half = half < HALF
        if NEOX:
            even = half
            odd = half + HALF
        else:
            even = 2 * half
            odd = 2 * half + 1
        q_mask = real[None, :] & in_half[:, None]
        q_even = tl.load(query_row[None, :] + even[:, None], mask=q_mask, other=0.0)
        q_odd = tl.load(query_row[None, :] + odd[:, None], mask=q_mask, other=0.0)
        up_ptr = k_up_ptr + kv_head * up_head_stride
        up_even = ()
        up_odd = ()
        for i in tl.static_range(len(K_SLICES)):
            up_even += (load_up(up_ptr, even, in_half, up_row_stride, *K_SLICES[i]),)
            up_odd += (load_up(up_ptr, odd, in_half, up_row_stride, *K_SLICES[i]),)
        if PASSED > 0:
            rest = tl.arange(0, PASSED_PADDED)
            in_rest = rest < PASSED
            rest = rest + 2 * HALF
            q_rest = tl.load(
                query_row[None, :] + rest[:, None],
                mask=real[None, :] & in_rest[:, None],
                other=0.0,
            )
            up_rest = ()
            for i in tl.static_range(len(K_SLICES)):
                up_rest += (load_up(up_ptr, rest, in_rest, up_row_stride, *K_SLICES[i]),)
    else:
        q_latent = ()
        for i in tl.static_range(len(K_SLICES)):
            q_latent += (load_query(query_row, real, *K_SLICES[i]),)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = ()
    for i in tl.static_range(len(V_SLICES)):
        mixed += (zeros(ROWS, V_SLICES[i][2]),)

    # The last query of this block sees the most keys, the first one starts the window.
    last_token = tl.minimum(first + BLOCK_Q, query_length) - 1
    end = seq_len - query_length + last_token + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - query_length + first - WINDOW + 1, 0) // TILE * TILE
    if SPLIT:
        part = tl.maximum(tl.cdiv(tl.cdiv(end - begin, splits), TILE) * TILE, LEAST_PART)
        begin += tl.program_id(2) * part
        end = tl.minimum(end, begin + part)
    for tile in range(begin, end, TILE):
        key = tile + tl.arange(0, TILE)
        in_sequence = key < end
        if WINDOW > 0:  # pages before it may be others' by now
            in_sequence = in_sequence & (key > seq_len - query_length + first - WINDOW)
        table_row = block_table_ptr + request * table_stride
        if BLOCK_SIZE % TILE == 0:  # a tile lies in one page
            page = tl.load(table_row + tile // BLOCK_SIZE).to(tl.int64)
            place = tile % BLOCK_SIZE + tl.arange(0, TILE)
        else:
            page = tl.load(table_row + key // BLOCK_SIZE, mask=in_sequence, other=0).to(tl.int64)
            place = key % BLOCK_SIZE
        slot = (
            cache_ptr
            + page * cache_block_stride
            + kv_head // SHARED * cache_head_stride
            + place * cache_slot_stride
        )
        k_scale = tl.full([TILE], 1.0, tl.float32)
        if REBUILD:
            table = cos_sin_ptr + key[:, None] * cos_stride + half[None, :]
            table_mask = in_sequence[:, None] & in_half[None, :]
            cos = tl.load(table, mask=table_mask, other=0.0).to(tl.float32)
            sin = tl.load(table + HALF, mask=table_mask, other=0.0).to(tl.float32)
            k_even = tl.zeros([TILE, HALF_PADDED], tl.float32)
            k_odd = tl.zeros([TILE, HALF_PADDED], tl.float32)
            if PASSED > 0:
                k_rest = tl.zeros([TILE, PASSED_PADDED], tl.float32)
            for i in tl.static_range(len(K_PARTS)):
                z_k = load_values(slot, in_sequence, dtype, *K_PARTS[i])
                if K_PARTS[i][SHIFT] == 0:  # a tier begins
                    scale_before = k_scale
                    k_scale = load_scale(slot, in_sequence, scales_ptr, *K_PARTS[i])
                    if i > 0:
                        quotient = (scale_before / k_scale)[:, None]
                        k_even *= quotient
                        k_odd *= quotient
                        if PASSED > 0:
                            k_rest *= quotient
                k_even = tl.dot(z_k, up_even[i], k_even, input_precision="ieee")
                k_odd = tl.dot(z_k, up_odd[i], k_odd, input_precision="ieee")
                if PASSED > 0:
                    k_rest = tl.dot(z_k, up_rest[i], k_rest, input_precision="ieee")
            if dtype == tl.float16:  # which unscaled keys might leave
                k_even *= k_scale[:, None]
                k_odd *= k_scale[:, None]
                if PASSED > 0:
                    k_rest *= k_scale[:, None]
                k_scale = tl.full([TILE], 1.0, tl.float32)
            turned_even = (k_even * cos - k_odd * sin).to(dtype)
            turned_odd = (k_odd * cos + k_even * sin).to(dtype)
            scores = tl.dot(turned_even, q_even, input_precision="ieee")
            scores = tl.dot(turned_odd, q_odd, scores, input_precision="ieee")
            if PASSED > 0:
                scores = tl.dot(k_rest.to(dtype), q_rest, scores, input_precision="ieee")
        else:
            scores = tl.zeros([TILE, ROWS], tl.float32)
            for i in tl.static_range(len(K_PARTS)):
                z_k = load_values(slot, in_sequence, dtype, *K_PARTS[i])
                if K_PARTS[i][SHIFT] == 0:  # a tier begins
                    scale_before = k_scale
                    k_scale = load_scale(slot, in_sequence, scales_ptr, *K_PARTS[i])
                    if i > 0:
                        scores *= (scale_before / k_scale)[:, None]
                scores = tl.dot(z_k, q_latent[i], scores, input_precision="ieee")
        seen = key[:, None] <= position[None, :]
        if WINDOW > 0:
            seen = seen & (key[:, None] > position[None, :] - WINDOW)
        scores *= (scale * k_scale)[:, None]
        if SOFT_CAP > 0:
            scores = SOFT_CAP * _tanh(scores / SOFT_CAP)
        scores = tl.where(seen, scores, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(scores, axis=0))
        # A tile may lie wholly outside a row's window: exp(-inf - -inf) is not a number.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp(scores - shift[None, :])
        decay = tl.exp(highest - shift)
        total = total * decay + tl.sum(weights, axis=0)
        mixed_before = mixed
        mixed = ()
        for i in tl.static_range(len(V_PARTS)):
            z_v = load_values(slot, in_sequence, dtype, *V_PARTS[i])
            if V_PARTS[i][SHIFT] == 0:
                # fp16 holds all scales, those below 2^-14 with fewer digits.
                v_scale = load_scale(slot, in_sequence, scales_ptr, *V_PARTS[i])
                scaled = (weights * v_scale[:, None]).to(dtype)
            product = tl.dot(
                tl.trans(z_v), scaled, mixed_before[i] * decay[None, :], input_precision="ieee"
            )
            mixed += (product,)
        highest = new_highest

    output_row = (
        output_ptr
        + tl.program_id(2).to(tl.int64) * output_split_stride
        + (query_start + token).to(tl.int64) * output_token_stride
        + head * output_head_stride
    )
    if SPLIT:
        for i in tl.static_range(len(V_SLICES)):
            store_output(output_row, real, mixed[i], *V_SLICES[i])
        tl.store(output_row + V_RANK, highest, mask=real)
        tl.store(output_row + V_RANK + 1, total, mask=real)
    else:
        for i in tl.static_range(len(V_SLICES)):
            store_output(output_row, real, mixed[i] / total[None, :], *V_SLICES[i])


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    output: torch.Tensor,
    *,
    scale: float,
    layout: LatentLayout,
    k_up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """See vllm_svd.kernels.latent_attention; channels must be contiguous in every tensor.

    Slots of tiers must begin with a word: of any cache whose last dimension is layout.width.
    """
    tokens, heads, width = batch.num_tokens, query.shape[1], query.shape[2]
    requests, groups = batch.seq_lens.shape[0], kv_cache.shape[1]
    kv_heads = groups if k_up is None else k_up.shape[0]
    group = heads // kv_heads
    few = group * batch.max_query_len <= FEW_ROWS
    rows = padded(group, FEW_ROWS if few else MORE_ROWS)
    block_q = rows // group
    rotary_dim = 0 if rope is None else rope.cos_sin.shape[1]
    passed = 0 if rope is None else width - rotary_dim
    up, cos_sin = (k_up, rope.cos_sin) if k_up is not None and rope else (query, query)
    scales = scale_table(kv_cache.device) if layout.quantised else query
    k_parts, v_parts = parts_of(layout, query.dtype)
    k_padded, v_padded = (sum(part[2] for part in side) for side in (k_parts, v_parts))
    tile, stages = tiles_triton.tile(query, k_padded, v_padded, rotary_dim, rows)
    # Every request may add one block that is not full; the surplus returns at once.
    blocks = tokens // block_q + requests
    longest = batch.block_table.shape[1] * kv_cache.shape[2]
    programs = min(blocks, tokens) * kv_heads
    splits = split_triton.splits_of(programs, longest, query.device)
    parts = split_triton.parts(splits, tokens, heads, layout.v_rank, query.device)
    target = output[None] if parts is None else parts
    _attention_kernel[(blocks, kv_heads, splits)](
        query,
        kv_cache,
        target,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        up,
        cos_sin,
        scales,
        requests,
        splits,
        scale,
        *query.stride()[:2],
        *target.stride()[:3],
        batch.block_table.stride(0),
        *up.stride()[:2],
        cos_sin.stride(0),
        *kv_cache.stride()[:3],
        BLOCK_SIZE=kv_cache.shape[2],
        SHARED=kv_heads // groups,
        GROUP=group,
        BLOCK_Q=block_q,
        ROWS=rows,
        TILE=tile,
        K_PARTS=tuple(part[1:] for part in k_parts),
        V_PARTS=tuple(part[1:] for part in v_parts),
        K_SLICES=tuple(part[:4] for part in k_parts),
        V_SLICES=tuple(part[:4] for part in v_parts),
        REBUILD=rope is not None,
        NEOX=rope is None or rope.is_neox,
        HALF=rotary_dim // 2,
        HALF_PADDED=padded(max(1, rotary_dim // 2)),
        PASSED=passed,
        PASSED_PADDED=padded(max(1, passed)),
        WINDOW=sliding_window or 0,
        SOFT_CAP=soft_cap or 0.0,
        V_RANK=layout.v_rank,
        SPLIT=parts is not None,
        LEAST_PART=split_triton.LEAST_PART,
        num_stages=stages,
    )
    if parts is not None:
        split_triton.combine(parts, output, batch.query_start_loc)
