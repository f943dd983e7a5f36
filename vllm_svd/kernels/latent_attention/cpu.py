"""latent_attention on a CPU: requests of equal query length together, the context in tiles.

All arithmetic is fp32 (CPUs without bf16 units emulate them), with the online softmax of
FlashAttention, so memory stays bounded by one tile whatever the batch and the context.
"""

from collections import defaultdict

import torch

from vllm_svd.kernels.latent_attention.reference import rotate
from vllm_svd.kernels.paged_batch import PagedBatch, Rope

# Rebuilt keys and scores of one tile should stay in the last-level cache.
TILE_BYTES = 4 << 20


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    output: torch.Tensor,
    *,
    scale: float,
    k_rank: int,
    k_up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
) -> None:
    """See vllm_svd.kernels.latent_attention."""
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    by_query_length = defaultdict(list)
    for request in range(len(lengths)):
        if query_length := starts[request + 1] - starts[request]:
            by_query_length[query_length].append(request)
    up = None if k_up is None else k_up.float().transpose(1, 2)
    for query_length, requests in by_query_length.items():
        # Longest first, so that the requests still alive in a tile are a prefix.
        requests.sort(key=lambda request: -lengths[request])
        rows = torch.tensor([starts[request] for request in requests])
        rows = rows[:, None] + torch.arange(query_length)
        output[rows] = _attend_equal_queries(
            query[rows].float() * scale,
            kv_cache,
            batch.block_table[requests],
            [lengths[request] for request in requests],
            k_rank,
            up,
            rope,
            sliding_window,
        ).to(output.dtype)


def _attend_equal_queries(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
    k_rank: int,
    up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """query [requests, tokens, heads, d], scaled, to [requests, tokens, heads, v_rank] in fp32."""
    requests, tokens, heads, width = query.shape
    _, kv_heads, size, channels = kv_cache.shape
    group = heads // kv_heads
    queries = query.view(requests, tokens, kv_heads, group, width).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(requests, kv_heads, group * tokens, width)
    ends = torch.tensor(lengths)
    query_positions = (ends[:, None] - tokens + torch.arange(tokens)).repeat(1, group)

    highest = queries.new_full((requests, kv_heads, group * tokens, 1), -torch.inf)
    total = torch.zeros_like(highest)
    mixed = queries.new_zeros(requests, kv_heads, group * tokens, channels - k_rank)
    first_needed = 0
    if sliding_window is not None:
        first_needed = max(0, lengths[-1] - tokens - sliding_window + 1)
    per_slot = requests * kv_heads * (channels + width + 2 * group * tokens) * 4
    step = size * max(1, TILE_BYTES // (per_slot * size))
    for begin in range(first_needed // size * size, lengths[0], step):
        alive = sum(length > begin for length in lengths)
        end = min(begin + step, -(-lengths[0] // size) * size)
        blocks = block_table[:alive, begin // size : end // size].long()
        latents = kv_cache[blocks].permute(0, 2, 1, 3, 4).float().flatten(2, 3)
        positions = torch.arange(begin, end)
        unused = positions >= ends[:alive, None]
        latents.masked_fill_(unused[:, None, :, None], 0)  # slots never written may hold NaN
        keys, values = latents[..., :k_rank], latents[..., k_rank:]
        if rope is not None and up is not None:
            # Whole blocks are read; positions past the table belong to unused slots.
            in_table = positions.clamp(max=rope.cos_sin.shape[0] - 1)
            keys = rotate(keys @ up, rope, in_table)
        scores = queries[:alive] @ keys.transpose(-1, -2)
        hidden = positions > query_positions[:alive, :, None]
        if sliding_window is not None:
            hidden |= positions <= query_positions[:alive, :, None] - sliding_window
        scores.masked_fill_(hidden[:, None], -torch.inf)

        new_highest = torch.maximum(highest[:alive], scores.amax(dim=-1, keepdim=True))
        # A tile may lie wholly outside a query's window: exp(-inf - -inf) is not a number.
        shift = new_highest.clamp(min=torch.finfo(torch.float32).min)
        weights = torch.exp(scores.sub_(shift))
        decay = torch.exp(highest[:alive] - shift)
        total[:alive] = total[:alive] * decay + weights.sum(dim=-1, keepdim=True)
        mixed[:alive] = mixed[:alive] * decay + weights @ values
        highest[:alive] = new_highest
    result = (mixed / total).view(requests, kv_heads, group, tokens, -1)
    return result.permute(0, 3, 1, 2, 4).reshape(requests, tokens, heads, -1)
