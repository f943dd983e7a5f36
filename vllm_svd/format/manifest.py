"""manifest.json: every tensor and shard of a checkpoint, so that damage is found before loading."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.config import read_json

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "model.safetensors.index.json"
_HEADER_LIMIT = 100 << 20


class TensorRecord(BaseModel):
    """dtype in safetensors' spelling (BF16, F16, F32), shape, and the shard that holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[int, ...]
    shard: str


class ShardRecord(BaseModel):
    """Size in bytes and SHA-256 of one safetensors file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The complete list of tensors and files that make up the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: dict[str, TensorRecord]
    shards: dict[str, ShardRecord]


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointFormatError if manifest.json is absent or malformed."""
    raw = read_json(directory / MANIFEST_FILE)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        problems = [
            f"{MANIFEST_FILE} {'.'.join(map(str, item['loc']))}: {item['msg']}"
            for item in error.errors()
        ]
        raise CheckpointFormatError(
            str(directory), problems, "copy manifest.json again from where it was written"
        ) from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """Tensor entries of a safetensors file; raises ValueError that says how it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"only {size} bytes long")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"its header claims {length} bytes of a {size}-byte file")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
            raise ValueError("its header is not valid safetensors JSON") from None
    expected = 8 + length + end
    if size != expected:
        raise ValueError(f"{size} bytes long where its header promises {expected}")
    return entries
