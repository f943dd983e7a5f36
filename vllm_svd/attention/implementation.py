"""Attention over latents: which kernel runs, and with what of the layer."""

from typing import Any

import torch

from vllm_svd.attention.metadata import LatentMetadata
from vllm_svd.compat import AttentionImpl, RotaryEmbedding
from vllm_svd.format import KVProjection
from vllm_svd.kernels import latent_attention, latent_store
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import Rope


class LatentImpl(AttentionImpl[LatentMetadata]):
    """Implementation for both modes and any pair of ranks; the layer projects."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        sliding_window: int | None,
        soft_cap: float | None,
        kv_cache_dtype: str,
        projection: KVProjection,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        self.kv_cache_dtype = kv_cache_dtype
        self.projection = projection
        self.layout = LatentLayout.of(projection)
        self.rotary: RotaryEmbedding | None = None
        self._known: Rope | None = None

    @property
    def needs_rotary(self) -> bool:
        """Whether the model's rotary module must still be found."""
        return self.projection.mode == "pre" and self.rotary is None

    def do_kv_cache_update(
        self,
        layer: Any,  # noqa: ARG002
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write latents [tokens, groups, rank] to their slots."""
        latent_store.store(key, value, kv_cache, slot_mapping, self.layout)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,  # noqa: ARG002
        value: torch.Tensor,  # noqa: ARG002
        kv_cache: torch.Tensor,
        attn_metadata: LatentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,  # noqa: ARG002
        output_block_scale: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """query [tokens, heads, d or k_rank]; output [tokens, heads, v_rank or d] is written."""
        if attn_metadata is None:  # profiling run: no cache yet
            return output.fill_(0)
        k_up, v_up = self._bases(layer)
        latent_attention.attend(
            query,
            kv_cache,
            attn_metadata,
            output,
            scale=self.scale,
            layout=self.layout,
            k_up=k_up,
            v_up=v_up,
            rope=self._rope(),
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
        )
        return output

    def _rope(self) -> Rope | None:
        """The model's table, which may be another one once the model has changed its dtype."""
        rotary = self.rotary
        if rotary is None:
            return None
        table = rotary._buffers["cos_sin_cache"]  # a module's __getattr__ would be felt, here too
        if self._known is None or self._known.cos_sin is not table:
            self._known = Rope(table, rotary.is_neox_style)
        return self._known

    def _bases(self, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the kernel multiplies with: k_up where it rebuilds keys, or queries; v_up."""
        return layer.k_up if self.rotary else None, None


class ProjectingImpl(LatentImpl):
    """An implementation that stores and projects by itself: it is given what a dense one is."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write latents of key and value [tokens, KV heads, d] to their slots."""
        bases = layer._parameters  # a module's __getattr__ would cost as much as the products
        down = (bases["k_down"], bases["v_down"])
        latent_store.store(key, value, kv_cache, slot_mapping, self.layout, down)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LatentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output [tokens, heads, d]; key, value [tokens, KV heads, d] go to their slots."""
        if attn_metadata is not None:
            slots = attn_metadata.slot_mapping
            self.do_kv_cache_update(layer, key, value, kv_cache, slots)
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )

    def _bases(self, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both: queries and outputs are [tokens, heads, d]."""
        bases = layer._parameters
        return bases["k_up"], bases["v_up"]
