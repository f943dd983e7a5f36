"""The attention backend of latent caches, as vLLM's registry and runners see it."""

from vllm_svd.attention.implementation import LatentImpl, ProjectingImpl
from vllm_svd.attention.metadata import LatentMetadataBuilder
from vllm_svd.compat import AttentionBackend, KVCacheSpec, MultipleOf

BACKEND_NAME = "SVD_LATENT"
PREFERRED_BLOCK_SIZE = 64  # tokens: a multiple of every tile in kernels.latent_attention


class LatentBackend(AttentionBackend):
    """Cache [blocks, groups, block size, width of a LatentLayout], in any physical layout."""

    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,  # noqa: ARG004
    ) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user gave none: tiles of the GPU's kernel then lie in one page each."""
        return max(default_block_size, PREFERRED_BLOCK_SIZE)

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder


class ProjectingBackend(LatentBackend):
    """As LatentBackend, where attention stores what it is given: one operator a layer, not two."""

    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return ProjectingImpl
