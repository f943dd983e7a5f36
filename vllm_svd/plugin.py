"""Entry point of the `vllm.general_plugins` group: vLLM calls register() in every process."""


def register() -> None:
    """Make vLLM know the `svd` quantization config and our attention backend; idempotent."""
    from vllm_svd.attention.backend import BACKEND_NAME, LatentBackend
    from vllm_svd.compat import (
        AttentionBackendEnum,
        register_backend,
        register_quantization_config,
    )
    from vllm_svd.format import QUANT_METHOD
    from vllm_svd.quantization.config import SvdConfig

    register_quantization_config(QUANT_METHOD)(SvdConfig)
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, f"{LatentBackend.__module__}.{LatentBackend.__qualname__}")
