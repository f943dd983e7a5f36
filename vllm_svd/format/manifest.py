"""manifest.json: every tensor and shard of a checkpoint, so that damage is found before loading."""

import hashlib
import math
import struct
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    Strict,
    TypeAdapter,
    ValidationError,
)

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.config import read_json
from vllm_svd.format.dtypes import DTYPE_BYTES

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "model.safetensors.index.json"
_HEADER_LIMIT = 100 << 20

# Never a path: what is verified is what a loader finds in the directory.
ShardName = Annotated[str, Field(pattern=r"^model-\d{5}-of-\d{5}\.safetensors$")]


class TensorEntry(BaseModel):
    """One tensor in the header of a safetensors file; offsets count from the end of the header."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: str
    shape: Annotated[tuple[NonNegativeInt, ...], Strict(False)]
    data_offsets: Annotated[tuple[NonNegativeInt, NonNegativeInt], Strict(False)]

    @property
    def bytes(self) -> int:
        """What its shape and dtype take; what its offsets say for a dtype the format refuses."""
        begin, end = self.data_offsets
        item = DTYPE_BYTES.get(self.dtype)
        return end - begin if item is None else math.prod(self.shape) * item


_HEADER = TypeAdapter(dict[str, TensorEntry | dict[str, str]])


class TensorRecord(BaseModel):
    """dtype in safetensors' spelling (BF16, F16, F32), shape, and the shard that holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[int, ...]
    shard: ShardName


class ShardRecord(BaseModel):
    """Size in bytes and SHA-256 of one safetensors file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The complete list of tensors and files that make up the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: dict[str, TensorRecord]
    shards: dict[ShardName, ShardRecord]


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


def read_header(path: Path) -> dict[str, TensorEntry]:
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
            header = _HEADER.validate_json(file.read(length))
        except (ValidationError, RecursionError):
            raise ValueError("its header is not valid safetensors JSON") from None
    header.pop("__metadata__", None)
    entries = {name: entry for name, entry in header.items() if isinstance(entry, TensorEntry)}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets != (end, end + entry.bytes):
            raise ValueError(f"{name} lies at {list(entry.data_offsets)}, {end} was expected")
        end += entry.bytes
    expected = 8 + length + end
    if size != expected:
        raise ValueError(f"{size} bytes long where its header promises {expected}")
    return entries
