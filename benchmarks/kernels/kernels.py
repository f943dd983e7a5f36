"""The two sides of a comparison as functions without arguments: ours, and vLLM's dense kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.geometry import BLOCK, Step, Variant
from vllm_svd.kernels import latent_attention


@dataclass(frozen=True)
class Kernel:
    """A call, and the bytes of cache and operations that one call cannot do without."""

    name: str
    run: Callable[[], object]
    bytes: int
    operations: int


def latent(step: Step, variant: Variant) -> Kernel:
    """Attention over a latent cache."""
    g, arguments = step.geometry, latent_arguments(step, variant)
    layout, rope = arguments["layout"], arguments["rope"]
    width = arguments["query"].shape[2]
    operations = 2 * step.pairs * g.kv_heads * g.group * (width + layout.v_rank)
    if rope is not None:  # every KV head its own keys, once
        operations += 2 * step.batch * step.context * g.kv_heads * g.head_dim * layout.k_rank
    run = partial(latent_attention.attend, **arguments)
    return Kernel(variant.name, run, cached_bytes(step, arguments["kv_cache"]), operations)


def latent_arguments(step: Step, variant: Variant) -> dict[str, Any]:
    """Of latent_attention.attend."""
    g, layout = step.geometry, variant.layout(step.geometry)
    groups, pages = g.kv_heads // variant.shared, step.pages
    latents = step.random(pages.numel(), groups, BLOCK, layout.k_rank + layout.v_rank)
    rebuilt = variant.mode == "pre" or variant.shared > 1
    query = step.random(step.rows, g.kv_heads * g.group, g.head_dim if rebuilt else layout.k_rank)
    return {
        "query": query,
        "kv_cache": layout.write(latents[..., : layout.k_rank], latents[..., layout.k_rank :]),
        "batch": step.paged(),
        "output": query.new_empty(step.rows, g.kv_heads * g.group, layout.v_rank),
        "scale": g.head_dim**-0.5,
        "layout": layout,
        "k_up": step.random(g.kv_heads, g.head_dim, layout.k_rank) if rebuilt else None,
        "rope": step.rope() if rebuilt else None,
        "sliding_window": None,
        "soft_cap": None,
    }


def cached_bytes(step: Step, cache: torch.Tensor) -> int:
    """Of latents [.., groups, .., width] that a step has to read."""
    return step.batch * step.context * cache.shape[1] * cache.shape[3] * cache.itemsize


def dense(step: Step) -> Kernel:
    """vLLM's own kernel over a dense paged cache: CPU_ATTN, or FlashAttention on a GPU."""
    run = _dense_cuda(step) if step.device.type == "cuda" else _dense_cpu(step)
    return Kernel("dense", run, step.dense_bytes(), step.dense_operations())


def _dense_cpu(step: Step) -> Callable[[], object]:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    g, pages, batch = step.geometry, step.pages, step.paged()
    heads = g.kv_heads * g.group
    isa = _get_attn_isa(step.dtype, BLOCK, g.head_dim)
    keys, values = step.random(pages.numel(), g.kv_heads, 2 * BLOCK, g.head_dim).chunk(2, dim=2)
    query = step.random(step.rows, heads, g.head_dim)
    output = torch.empty_like(query)
    plan = ops.cpu_attn_get_scheduler_metadata(
        step.batch,
        heads,
        g.kv_heads,
        g.head_dim,
        batch.seq_lens,
        step.dtype,
        batch.query_start_loc,
        True,
        -1,
        isa,
        True,
    )
    return lambda: ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=keys,
        value_cache=values,
        output=output,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        scale=g.head_dim**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=pages,
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
    )


def _dense_cuda(step: Step) -> Callable[[], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    g, pages, batch = step.geometry, step.pages, step.paged()
    shape = (pages.numel(), BLOCK, g.kv_heads, g.head_dim)
    keys, values = step.random(*shape), step.random(*shape)
    query = step.random(step.rows, g.kv_heads * g.group, g.head_dim)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        max_seqlen_q=step.queries,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_k=step.context,
        seqused_k=batch.seq_lens,
        softmax_scale=g.head_dim**-0.5,
        causal=True,
        block_table=pages,
    )
