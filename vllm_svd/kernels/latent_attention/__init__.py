"""Causal attention of a ragged batch over a paged cache of latents."""

from typing import Any

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
    soft_cap: float | None,
    v_up: torch.Tensor | None = None,
) -> None:
    """Write softmax(S) Z_v with S = scale * Q K^T to output [tokens, heads, v_rank].

    With `soft_cap`, S is soft_cap * tanh(scale * Q K^T / soft_cap).

    kv_cache [blocks, groups, block size, layout.width] holds z_k and z_v as `layout` says; each
    group is read by as many query heads. With `rope` the keys are RoPE(k_up z_k) at each token's
    position (k_up [KV heads, d, k_rank], KV heads a multiple of groups) and query [tokens, heads,
    d] is already rotated. Without, the keys are z_k and query is [.., k_rank].

    A CPU also takes the bases of the other projections: without `rope`, k_up multiplies a query
    [.., d]; v_up [KV heads, d, v_rank] multiplies the output, [.., d].
    """
    if compiled.attend(
        query,
        kv_cache,
        batch,
        output,
        scale=scale,
        layout=layout,
        k_up=k_up,
        rope=rope,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        v_up=v_up,
    ):
        return
    settings: dict[str, Any] = {
        **{"scale": scale, "layout": layout, "k_up": k_up, "rope": rope},
        **{"sliding_window": sliding_window, "soft_cap": soft_cap},
    }
    if not query.is_cuda:
        cpu.attend(query, kv_cache, batch, output, **settings, v_up=v_up)
        return
    from vllm_svd.kernels.latent_attention import triton

    if v_up is not None or (k_up is not None and rope is None):
        raise ValueError("latent_attention on a GPU leaves projections to its caller")
    triton.attend(query, kv_cache, batch, output, **settings)
