"""An attention layer whose paged cache holds latents of its keys and values.

On a GPU, and where vLLM's own kernel serves, the projections stand around vLLM's attention ops,
inside the traced graph, so that torch.compile may fuse them with what the model does before and
after. In our own ops for CPUs, where a decode step is mostly the cost of starting operators, they
are part of the ops, and of their machine code.
"""

from dataclasses import replace

import torch

from vllm_svd.attention.backend import LatentBackend, ProjectingBackend
from vllm_svd.attention.implementation import ProjectingImpl
from vllm_svd.attention.rotary import watch_for_rotary
from vllm_svd.compat import (
    Attention,
    AttentionType,
    KVCacheSpec,
    VllmConfig,
    encode_layer_name,
)
from vllm_svd.errors import UnsupportedModelError
from vllm_svd.format import KVProjection
from vllm_svd.kernels import native
from vllm_svd.kernels.products import of_query_heads, project

# Backends that serve any head size they list when constructed as Attention constructs them.
CPU_BACKEND = "CPU_ATTN"
NATIVE_BACKENDS = (CPU_BACKEND, "FLASH_ATTN", "TRITON_ATTN")
CUDA_RANK_MULTIPLE = 8
# What vLLM's CPU kernel stores in fp8, where the CPU has AVX-512.
CPU_FP8 = ("fp8", "fp8_e4m3")
CPU_FP8_MULTIPLE = 32


class LatentAttention(Attention):
    """vLLM's Attention with latents in the cache; instances come from make_latent().

    Parameters: k_down [groups, k_rank, g * d], k_up [KV heads, d, k_rank], v_down, v_up; a group is
    g KV heads that share a latent.
    """

    projection: KVProjection

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """query [tokens, heads * d], key and value [tokens, KV heads * d] to [tokens, heads * d].

        Mode `pre` expects a key without RoPE.
        """
        if isinstance(self.impl, ProjectingImpl):
            attended: torch.Tensor = super().forward(query, key, value, output_shape, output_dtype)
            return attended
        queries = query.view(-1, self.num_heads, self.head_size)
        k_latent = project(key.view(-1, self.num_kv_heads, self.head_size), self.k_down)
        v_latent = project(value.view(-1, self.num_kv_heads, self.head_size), self.v_down)
        if self.projection.mode == "post":
            queries = of_query_heads(queries, self.k_up)
        latent_output = torch.empty(
            (queries.shape[0], self.num_heads, self.projection.v_rank),
            dtype=output_dtype or query.dtype,
            device=query.device,
        )
        name = encode_layer_name(self.layer_name)
        updated = torch.ops.vllm.unified_kv_cache_update(k_latent, v_latent, name)
        torch.ops.vllm.unified_attention_with_output(
            queries, k_latent, v_latent, latent_output, name, kv_cache_dummy_dep=updated
        )
        output = of_query_heads(latent_output, self.v_up.transpose(1, 2))
        return output.flatten(1)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """vLLM's spec of this layer, with latents in place of heads, and their sizes."""
        projection = self.projection
        spec = super().get_kv_cache_spec(vllm_config)
        groups = self.num_kv_heads // projection.group
        if not projection.k_tiers:
            k_size, v_size = projection.k_rank, projection.v_rank
            return replace(spec, num_kv_heads=groups, head_size=k_size, head_size_v=v_size)
        k_size, v_size = projection.slot_shares(spec.dtype.itemsize)
        return replace(
            spec, num_kv_heads=groups, head_size=k_size, head_size_v=v_size, dtype=torch.uint8
        )


def make_latent(layer: Attention, projection: KVProjection) -> None:
    """Turn a finished Attention layer into a LatentAttention with the reduced cache.

    Raises UnsupportedModelError for what the implementation at hand cannot serve.
    """
    _refuse_unsupported(layer, projection)
    layer.__class__ = LatentAttention
    layer.projection = projection
    soft_cap = getattr(layer.impl, "logits_soft_cap", None) or None  # backends keep 0 for none
    if _rides_native(layer, projection):
        layer.impl = type(layer.impl)(
            layer.num_heads,
            projection.k_rank,
            layer.impl.scale,
            layer.num_kv_heads,
            None,
            layer.sliding_window,
            layer.kv_cache_dtype,
            soft_cap,
            layer.attn_type,
            None,
        )
        return
    _refuse_ranks(layer, projection)
    backend = ProjectingBackend if _on_cpu(layer) else LatentBackend
    layer.impl = backend.get_impl_cls()(
        num_heads=layer.num_heads,
        head_size=layer.head_size,
        scale=layer.impl.scale,
        num_kv_heads=layer.num_kv_heads // projection.group,
        sliding_window=layer.sliding_window,
        soft_cap=soft_cap,
        kv_cache_dtype=layer.kv_cache_dtype,
        projection=projection,
    )
    layer.attn_backend = backend
    if projection.mode == "pre":
        watch_for_rotary()


def _native_head_size(layer: Attention, projection: KVProjection) -> bool:
    """Whether attention over these latents is what vLLM's backend does at a smaller head size.

    Its metadata builders plan for the model's own number of KV heads: groups are not for them.
    """
    return bool(
        projection.mode == "post"
        and projection.group == 1
        and not projection.k_tiers
        and projection.k_rank == projection.v_rank
        and layer.attn_backend.get_name() in NATIVE_BACKENDS
        and layer.attn_backend.supports_head_size(projection.k_rank)
    )


def _rides_native(layer: Attention, projection: KVProjection) -> bool:
    """Whether vLLM's own kernel serves: on a CPU only what ours does not, which is faster there."""
    ours = _on_cpu(layer) and native.is_there() and not _quantised_by_vllm(layer)
    return not ours and _native_head_size(layer, projection)


def _on_cpu(layer: Attention) -> bool:
    return bool(layer.attn_backend.get_name() == CPU_BACKEND)


def _quantised_by_vllm(layer: Attention) -> bool:
    return bool(layer.kv_cache_torch_dtype != layer.dtype)


def _stores(layer: Attention, projection: KVProjection) -> bool:
    """Whether latents can be stored in the dtype that --kv-cache-dtype asks for.

    vLLM's own kernel does it where it rides along, in fp8 without scales. Only on a CPU: kernels
    for GPUs want queries in fp8, too, which vLLM's layer makes before projections.
    """
    if not _quantised_by_vllm(layer):
        return True
    fits = _native_head_size(layer, projection) and projection.k_rank % CPU_FP8_MULTIPLE == 0
    return _on_cpu(layer) and layer.kv_cache_dtype in CPU_FP8 and fits


def _refuse_unsupported(layer: Attention, projection: KVProjection) -> None:
    impl = layer.impl
    refusals = {
        f"KV cache dtype {layer.kv_cache_dtype}": not _stores(layer, projection),
        f"attention of type {layer.attn_type}": layer.attn_type != AttentionType.DECODER,
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "a KV cache shared between layers": layer.kv_sharing_target_layer_name is not None,
    }
    found = [what for what, present in refusals.items() if present]
    if found:
        raise UnsupportedModelError(
            f"{layer.layer_name}: K/V projections do not work with {' and '.join(found)}",
            "decoder attention with RoPE, cached in the model's dtype (--kv-cache-dtype auto); on "
            "a CPU also in fp8 where mode post has equal ranks that are multiples of 32 in group 1",
            "drop the flag (latents have stores of their own: --kv-store when compressing), or "
            "compress the model without K/V projections (kv.kept: null)",
        )


def _refuse_ranks(layer: Attention, projection: KVProjection) -> None:
    ranks = (projection.k_rank, projection.v_rank)
    if (
        not _on_cpu(layer)
        and not projection.k_tiers
        and any(rank % CUDA_RANK_MULTIPLE for rank in ranks)
    ):
        raise UnsupportedModelError(
            f"{layer.layer_name}: ranks {ranks} are not served on this device",
            f"multiples of {CUDA_RANK_MULTIPLE}, for aligned loads; any rank on a CPU",
            f"compress the model again with kv.rank_multiple: {CUDA_RANK_MULTIPLE} in the recipe",
        )
