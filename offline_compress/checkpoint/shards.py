"""Tensors to safetensors shards, their index and their manifest, one shard in memory at a time."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from offline_compress.progress import Progress, silent
from offline_compress.weights import shard_errors
from vllm_svd.format import Manifest, ShardRecord, TensorRecord, sha256
from vllm_svd.format.dtypes import DTYPE_BYTES
from vllm_svd.format.manifest import INDEX_FILE, MANIFEST_FILE

MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its description now, its values when its shard's turn comes."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_shards(
    directory: Path,
    tensors: Mapping[str, Pending],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> Manifest:
    """Write model-*.safetensors, the index and manifest.json; a larger tensor has its own shard."""
    groups = _grouped(tensors, max_shard_bytes)
    records: dict[str, TensorRecord] = {}
    shards: dict[str, ShardRecord] = {}
    progress("write", 0, len(groups))
    for number, names in enumerate(groups, start=1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        path = directory / shard
        save_file(
            {name: tensors[name].read().contiguous().cpu() for name in names},
            path,
            metadata={"format": "pt"},
        )
        path.chmod(0o644)
        shards[shard] = ShardRecord(bytes=path.stat().st_size, sha256=sha256(path))
        for name in names:
            pending = tensors[name]
            records[name] = TensorRecord(dtype=pending.dtype, shape=pending.shape, shard=shard)
        progress("write", number, len(groups))
    manifest = Manifest(tensors=records, shards=shards)
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n")
    index = {
        "metadata": {"total_size": sum(pending.bytes for pending in tensors.values())},
        "weight_map": {name: record.shard for name, record in records.items()},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    return manifest


def stored_tensors(directory: Path, manifest: Manifest) -> Callable[[str], torch.Tensor]:
    """Reads one tensor of a verified checkpoint; raises SourceError if its shard is damaged."""

    def read(name: str) -> torch.Tensor:
        path = directory / manifest.tensors[name].shard
        with shard_errors(directory), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    return read


def _grouped(tensors: Mapping[str, Pending], limit: int) -> list[list[str]]:
    groups: list[list[str]] = []
    filled = limit
    for name, pending in tensors.items():
        if not groups or filled + pending.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += pending.bytes
    return groups
