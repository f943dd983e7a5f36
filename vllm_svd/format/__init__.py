"""The on-disk contract (docs/checkpoint_format.md): neither torch nor vLLM is needed to read it."""

from vllm_svd.format.config import FORMAT_VERSION, QUANT_METHOD, SvdCheckpointConfig, parse, read
from vllm_svd.format.delta import Delta
from vllm_svd.format.kv import (
    BITS,
    STORES,
    WORD_BYTES,
    KVProjection,
    Mode,
    Side,
    Store,
    Tier,
    in_words,
    latent_bytes,
    slot_bytes,
)
from vllm_svd.format.linear import Stored
from vllm_svd.format.manifest import Manifest, ShardRecord, TensorRecord, sha256
from vllm_svd.format.modules import (
    Codebook,
    LowRank,
    LowRankInt8,
    Module,
    Reduced,
)
from vllm_svd.format.verify import verify

__all__ = [
    "BITS",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "STORES",
    "WORD_BYTES",
    "Codebook",
    "Delta",
    "KVProjection",
    "LowRank",
    "LowRankInt8",
    "Manifest",
    "Mode",
    "Module",
    "Reduced",
    "ShardRecord",
    "Side",
    "Store",
    "Stored",
    "SvdCheckpointConfig",
    "TensorRecord",
    "Tier",
    "in_words",
    "latent_bytes",
    "parse",
    "read",
    "sha256",
    "slot_bytes",
    "verify",
]
