"""The on-disk contract (docs/checkpoint_format.md): neither torch nor vLLM is needed to read it."""

from vllm_svd.format.config import FORMAT_VERSION, QUANT_METHOD, SvdCheckpointConfig, parse, read
from vllm_svd.format.manifest import Manifest, ShardRecord, TensorRecord, sha256
from vllm_svd.format.modules import KVProjection, LowRank, Module
from vllm_svd.format.verify import verify

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "KVProjection",
    "LowRank",
    "Manifest",
    "Module",
    "ShardRecord",
    "SvdCheckpointConfig",
    "TensorRecord",
    "parse",
    "read",
    "sha256",
    "verify",
]
