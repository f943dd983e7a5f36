"""What one scheduler step tells the kernels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_svd.compat import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCacheSpec,
    VllmConfig,
)
from vllm_svd.errors import UnsupportedModelError
from vllm_svd.kernels.paged_batch import PagedBatch

# Where what is built of vLLM's metadata is kept with it.
_SHARED = "_latent_metadata"


@dataclass(frozen=True, eq=False)
class LatentMetadata(PagedBatch, AttentionMetadata):
    """The batch of this step, and where its tokens are to be stored."""

    slot_mapping: torch.Tensor
    """[query tokens, or more: padding is -1] int64."""


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds no tensor of its own, so one builder per distinct pair of ranks costs nothing."""

    # The launch depends on host sizes, and is right for any batch of no more tokens and requests;
    # all else is read from device tensors.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract there

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        if common_attn_metadata.causal is not True:
            raise UnsupportedModelError(
                "this step asks for attention that is not causal",
                "causal attention",
                "serve the model without K/V projections (kv.kept: null in the recipe)",
            )
        # Layers of other ranks are other groups of one batch, which they are to share. The steps of
        # a drafter change one object in place, tensors included: those share nothing.
        known: LatentMetadata | None = vars(common_attn_metadata).get(_SHARED)
        if not fast_build and known is not None and _is_of(known, common_attn_metadata):
            return known
        metadata = LatentMetadata(
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            num_tokens=common_attn_metadata.num_actual_tokens,
            max_query_len=common_attn_metadata.max_query_len,
            slot_mapping=common_attn_metadata.slot_mapping,
        )
        setattr(common_attn_metadata, _SHARED, None if fast_build else metadata)
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> LatentMetadata:
        # One key per sequence: capture need not walk max_model_len of an empty cache.
        common_attn_metadata.seq_lens.fill_(1)
        return self.build(0, common_attn_metadata)


def _is_of(metadata: LatentMetadata, common: CommonAttentionMetadata) -> bool:
    return (
        metadata.query_start_loc is common.query_start_loc
        and metadata.seq_lens is common.seq_lens
        and metadata.block_table is common.block_table_tensor
        and metadata.slot_mapping is common.slot_mapping
        and metadata.num_tokens == common.num_actual_tokens
        and metadata.max_query_len == common.max_query_len
    )
