"""Defines latent_attention: one query token at a time, in the dtype asked for."""

import torch

from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch, Rope


def rotate(x: torch.Tensor, rope: Rope, positions: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., tokens, d] at positions [tokens]."""
    table = rope.cos_sin[positions].to(x.dtype)
    cos, sin = table.chunk(2, dim=-1)
    rotary_dim = table.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if rope.is_neox:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pairs, dim=-1).flatten(-2)
    return torch.cat((turned, passed), dim=-1)


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
    dtype: torch.dtype = torch.float64,
) -> None:
    """See vllm_svd.kernels.latent_attention."""
    size, groups = kv_cache.shape[2], kv_cache.shape[1]
    up = v_up if k_up is None else k_up
    kv_heads = groups if up is None else up.shape[0]
    group = query.shape[1] // kv_heads
    starts = batch.query_start_loc.tolist()
    for request, length in enumerate(batch.seq_lens.tolist()):
        first, last = starts[request], starts[request + 1]
        for token in range(first, last):
            end = length - (last - token) + 1
            begin = 0 if sliding_window is None else max(0, end - sliding_window)
            positions = torch.arange(begin, end, device=query.device)
            blocks = batch.block_table[request, positions // size].long()
            slots = kv_cache[blocks, :, positions % size]  # [keys, groups, width]
            by_head = slots.transpose(0, 1).repeat_interleave(kv_heads // groups, 0)
            keys, values = layout.read(by_head, dtype)
            if k_up is not None and rope is not None:
                keys = rotate(keys @ k_up.to(dtype).transpose(1, 2), rope, positions)
            queries = query[token].to(dtype).view(kv_heads, group, -1)
            if k_up is not None and rope is None:
                queries = queries @ k_up.to(dtype)
            scores = scale * queries @ keys.transpose(1, 2)
            if soft_cap is not None:
                scores = soft_cap * (scores / soft_cap).tanh()
            mixed = scores.softmax(dim=-1) @ values
            if v_up is not None:
                mixed = mixed @ v_up.to(dtype).transpose(1, 2)
            output[token] = mixed.reshape(kv_heads * group, -1).to(output.dtype)
