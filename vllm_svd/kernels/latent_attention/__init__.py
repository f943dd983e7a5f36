"""Causal attention of a ragged batch over a paged cache of latents."""

import torch

from vllm_svd.kernels.latent_attention import compiled, cpu
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch, Rope


def prepare(device: torch.device) -> None:
    """What the first call would wait for: compile for a CPU, put tables on a GPU.

    The latter also keeps copies from the host out of CUDA graphs.
    """
    if device.type == "cuda":
        from vllm_svd.kernels import latent_tiers_triton

        latent_tiers_triton.scale_table(device)
        latent_tiers_triton.bounds(device)
    else:
        compiled.warm_up()


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
) -> None:
    """Write softmax(scale * Q K^T) Z_v to output [tokens, heads, v_rank].

    kv_cache [blocks, groups, block size, layout.width] holds z_k and z_v as `layout` says; each
    group is read by as many query heads. Without `rope` the keys are z_k and query is [tokens,
    heads, k_rank]; with it (and k_up [KV heads, d, k_rank], KV heads a multiple of groups) they are
    RoPE(k_up z_k) at each token's position and query, already rotated, is [.., d].
    """
    if query.is_cuda:
        from vllm_svd.kernels.latent_attention import triton

        run = triton.attend
    else:
        run = cpu.attend
    run(
        query,
        kv_cache,
        batch,
        output,
        scale=scale,
        layout=layout,
        k_up=k_up,
        rope=rope,
        sliding_window=sliding_window,
    )
