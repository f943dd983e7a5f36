"""latent_attention on a CPU in torch, where numba is missing: the context in tiles.

All arithmetic is fp32 (CPUs without bf16 units emulate them), with the online softmax of
FlashAttention, so memory stays bounded by one tile whatever the batch and the context. Requests of
equal query length are taken together.
"""

import itertools
from collections import defaultdict

import torch

from vllm_svd.kernels.latent_attention.compiled import LOG2_E
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch, Rope, once_per_batch
from vllm_svd.kernels.products import of_query_heads

# Rebuilt keys and scores of one tile should stay in the last-level cache.
TILE_BYTES = 4 << 20
# Query tokens at a time: keys are rebuilt for each block of them.
QUERY_BLOCK = 128


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
    v_up: torch.Tensor | None = None,
) -> None:
    """See vllm_svd.kernels.latent_attention."""
    up = None if k_up is None else k_up.float().transpose(1, 2)
    # Scores are powers of two; those with a cap only once they are capped.
    factor = scale * LOG2_E if soft_cap is None else scale / soft_cap
    for query_length, runs in _blocks(batch).items():
        requests, firsts, lengths = (list(column) for column in zip(*runs, strict=True))
        rows = torch.tensor(firsts)[:, None] + torch.arange(query_length)
        queries = query[rows].float() * factor
        if k_up is not None and rope is None:
            queries = of_query_heads(queries, k_up.float())
        result = _attend_equal_queries(
            queries,
            kv_cache,
            batch.block_table[requests],
            lengths,
            layout,
            up,
            rope,
            sliding_window,
            soft_cap,
        )
        if v_up is not None:
            result = of_query_heads(result, v_up.float().transpose(1, 2))
        output[rows] = result.to(output.dtype)


Blocks = dict[int, list[tuple[int, int, int]]]
"""Runs of query tokens, by their length: request, first token, tokens that the last one sees."""


@once_per_batch
def _blocks(batch: PagedBatch) -> Blocks:
    """Query tokens of all requests in runs of at most QUERY_BLOCK.

    A run attends to what its last token sees: shorter runs waste less of what lies above the
    diagonal. Longest contexts first, so that those still alive in a tile are a prefix.
    """
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    found = defaultdict(list)
    for request, (first, after) in enumerate(itertools.pairwise(starts)):
        for begin in range(first, after, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, after)
            found[end - begin].append((request, begin, lengths[request] - after + end))
    return {count: sorted(runs, key=lambda run: -run[2]) for count, runs in found.items()}


def _attend_equal_queries(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
    layout: LatentLayout,
    up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """query [requests, tokens, heads, d], scaled, to [requests, tokens, heads, v_rank] in fp32.

    KV heads come first in every intermediate, so that rebuilding keys is one product per head.
    """
    requests, tokens, heads, width = query.shape
    groups, size = kv_cache.shape[1:3]
    channels = layout.k_rank + layout.v_rank
    kv_heads = groups if up is None else len(up)
    group = heads // kv_heads
    queries = query.view(requests, tokens, kv_heads, group, width).permute(2, 0, 3, 1, 4)
    queries = queries.reshape(kv_heads, requests, group * tokens, width)
    ends = torch.tensor(lengths)
    query_positions = (ends[:, None] - tokens + torch.arange(tokens)).repeat(1, group)

    highest = queries.new_full((kv_heads, requests, group * tokens, 1), -torch.inf)
    total = torch.zeros_like(highest)
    mixed = queries.new_zeros(kv_heads, requests, group * tokens, layout.v_rank)
    first_needed = 0
    if sliding_window is not None:
        first_needed = max(0, lengths[-1] - tokens - sliding_window + 1)
    per_slot = requests * kv_heads * (channels + 2 * width + 2 * group * tokens) * 4
    step = size * max(1, TILE_BYTES // (per_slot * size))
    for begin in range(first_needed // size * size, lengths[0], step):
        alive = sum(length > begin for length in lengths)
        end = min(begin + step, -(-lengths[0] // size) * size)
        blocks = block_table[:alive, begin // size : end // size].long()
        positions = torch.arange(begin, end)
        unused = positions >= ends[:alive, None]
        keys, values = _gather(kv_cache, blocks, unused, layout)
        if kv_heads > groups:  # repeating once would be a copy, too
            keys, values = (z.repeat_interleave(kv_heads // groups, 0) for z in (keys, values))
        if rope is not None and up is not None:
            rebuilt = torch.bmm(keys.flatten(1, 2), up).view(*keys.shape[:3], width)
            # Whole blocks are read; positions past the table belong to unused slots.
            keys = _rotate(rebuilt, rope, positions.clamp(max=rope.cos_sin.shape[0] - 1))
        scores = queries[:, :alive] @ keys.transpose(-1, -2)
        if soft_cap is not None:
            scores.tanh_().mul_(soft_cap * LOG2_E)
        # Before the first query all is seen, except what lies before a window.
        seen = 0 if sliding_window is not None else max(0, min(lengths[:alive]) - tokens - begin)
        if seen < len(positions):
            distance = query_positions[:alive, :, None] - positions[seen:]
            hidden = distance < 0
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            scores[..., seen:].masked_fill_(hidden, -torch.inf)  # whatever was there, as NaN

        before = highest[:, :alive]
        after = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
        # A tile may lie wholly outside a query's window: exp(-inf - -inf) is not a number.
        shift = after.clamp(min=torch.finfo(torch.float32).min)
        weights = scores.sub_(shift).exp2_()
        decay = torch.exp2(before - shift)
        total[:, :alive] = total[:, :alive] * decay + weights.sum(dim=-1, keepdim=True)
        mixed[:, :alive] = mixed[:, :alive] * decay + weights @ values
        highest[:, :alive] = after
    result = (mixed / total).view(kv_heads, requests, group, tokens, -1)
    return result.permute(1, 3, 0, 2, 4).reshape(requests, tokens, heads, -1)


def _gather(
    cache: torch.Tensor, blocks: torch.Tensor, unused: torch.Tensor, layout: LatentLayout
) -> list[torch.Tensor]:
    """Both latents [groups, requests, positions, channels] in fp32, zero in unused slots."""
    slots = cache[blocks].permute(2, 0, 1, 3, 4).flatten(2, 3)
    # slots never written may hold NaN
    return [z.masked_fill(unused[:, :, None], 0) for z in layout.read(slots)]


def _rotate(x: torch.Tensor, rope: Rope, positions: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., positions, d], as reference.rotate but without temporaries."""
    cos, sin = rope.cos_sin[positions].float().chunk(2, dim=-1)
    rotary_dim = 2 * cos.shape[-1]
    if rope.is_neox:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    else:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    rotated = torch.empty_like(x)
    torch.mul(x[..., first], cos, out=rotated[..., first])
    rotated[..., first].addcmul_(x[..., second], sin, value=-1)
    torch.mul(x[..., second], cos, out=rotated[..., second])
    rotated[..., second].addcmul_(x[..., first], sin)
    rotated[..., rotary_dim:] = x[..., rotary_dim:]
    return rotated
