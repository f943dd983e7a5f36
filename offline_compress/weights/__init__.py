"""Reading the dense model."""

from offline_compress.weights.source import (
    TORCH_DTYPES,
    DType,
    Source,
    SourceError,
    item_bytes,
    open_source,
    shard_errors,
)

__all__ = [
    "TORCH_DTYPES",
    "DType",
    "Source",
    "SourceError",
    "item_bytes",
    "open_source",
    "shard_errors",
]
