"""Reading the dense model."""

from offline_compress.weights.base import open_base, reference_to
from offline_compress.weights.quantised import Quantised, quantised_layers
from offline_compress.weights.shards import (
    TORCH_DTYPES,
    DType,
    Headers,
    SourceError,
    item_bytes,
    shard_errors,
)
from offline_compress.weights.source import (
    Source,
    meta_model,
    model_config,
    open_source,
    stored_dtype,
)

__all__ = [
    "TORCH_DTYPES",
    "DType",
    "Headers",
    "Quantised",
    "Source",
    "SourceError",
    "item_bytes",
    "meta_model",
    "model_config",
    "open_base",
    "open_source",
    "quantised_layers",
    "reference_to",
    "shard_errors",
    "stored_dtype",
]
