"""Contexts in parts, for steps whose requests and heads alone would leave a GPU idle.

A part leaves its unnormalised output in fp32, its highest score and the sum of its weights; one
program per token and head combines them.
"""

import functools

import torch
import triton
import triton.language as tl

from vllm_svd.kernels.latent_tiers_triton import padded

WAVES = 2  # programs for each of the device's processors
LEAST_PART = 256  # tokens: whole tiles, fewer than which cost more to combine than they save
MOST_PARTS = 64


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits_of(programs: int, longest: int, device: torch.device) -> int:
    """In how many parts contexts of up to `longest` tokens are read, by so many programs.

    Known on the host, so that a CUDA graph of one size fixes it; any number is right for any batch.
    """
    wanted = -(-WAVES * processors(device) // programs)
    return max(1, min(wanted, longest // LEAST_PART, MOST_PARTS))


def parts(
    splits: int, tokens: int, heads: int, v_rank: int, device: torch.device
) -> torch.Tensor | None:
    """[splits, tokens, heads, v_rank + 2] fp32: outputs, highest scores, sums; None for one."""
    if splits == 1:
        return None
    return torch.empty(splits, tokens, heads, v_rank + 2, dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["requests", "splits"])
def _combine_kernel(
    parts_ptr,
    output_ptr,
    query_start_ptr,
    requests,
    splits,
    split_stride,
    parts_token_stride,
    parts_head_stride,
    output_token_stride,
    output_head_stride,
    MOST_PARTS: tl.constexpr,
    V_RANK: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    if token >= tl.load(query_start_ptr + requests):
        return  # padding, of which nothing was computed
    first = parts_ptr + token * parts_token_stride + head * parts_head_stride
    part = tl.arange(0, MOST_PARTS)
    states = first + part * split_stride + V_RANK
    scores = tl.load(states, mask=part < splits, other=float("-inf"))
    # Every query sees itself, so one part at least has a score.
    highest = tl.max(scores, axis=0)
    sums = tl.load(states + 1, mask=part < splits, other=0.0)
    total = tl.sum(tl.exp(scores - highest) * sums, axis=0)
    channel = tl.arange(0, V_PADDED)
    mixed = tl.zeros([V_PADDED], tl.float32)
    for i in range(splits):
        row = first + i * split_stride
        weight = tl.exp(tl.load(row + V_RANK) - highest)
        if weight > 0:  # short contexts fill the first parts alone
            mixed += weight * tl.load(row + channel, mask=channel < V_RANK, other=0.0)
    target = output_ptr + token * output_token_stride + head * output_head_stride + channel
    tl.store(target, (mixed / total).to(target.dtype.element_ty), mask=channel < V_RANK)


def combine(parts: torch.Tensor, output: torch.Tensor, query_start_loc: torch.Tensor) -> None:
    """Write what `parts` make together to output [tokens, heads, v_rank]."""
    splits, tokens, heads, width = parts.shape
    _combine_kernel[(tokens, heads)](
        parts,
        output,
        query_start_loc,
        query_start_loc.shape[0] - 1,
        splits,
        *parts.stride()[:3],
        *output.stride()[:2],
        MOST_PARTS=MOST_PARTS,
        V_RANK=width - 2,
        V_PADDED=padded(width - 2),
    )
