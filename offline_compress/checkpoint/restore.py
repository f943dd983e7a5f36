"""A dense checkpoint from a compressed one: factors multiplied back."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open

from offline_compress import reference
from offline_compress.checkpoint.measurements import MEASUREMENTS_FILE
from offline_compress.checkpoint.shards import MAX_SHARD_BYTES, Pending, write_shards
from offline_compress.methods import LowRankFactors
from offline_compress.progress import Progress, silent
from offline_compress.staging import ensure_vacant, staged
from offline_compress.weights import TORCH_DTYPES, DType, shard_errors
from vllm_svd.format import Manifest, SvdCheckpointConfig, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import INDEX_FILE, MANIFEST_FILE, read_manifest

# Of the compressed checkpoint only; the rest beside the weights is the dense model's own.
_OWN = {"config.json", "recipe.yaml", "plan.json", "README.md", MEASUREMENTS_FILE}
_OWN |= {INDEX_FILE, MANIFEST_FILE}


def restore(
    compressed: Path,
    dense: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> int:
    """Write B A of every factorised weight, in the stored dtype, to a plain checkpoint `dense`.

    Returns the number of K/V projections that were dropped: a dense checkpoint cannot hold them.
    Raises CheckpointFormatError for a damaged input and OutputError for an unwritable output.
    """
    ensure_vacant(dense)
    config = verify(compressed)
    reference.check(compressed, config)
    manifest = read_manifest(compressed)
    tensors = _tensors(compressed, config, manifest)
    companions = [
        path
        for path in sorted(compressed.iterdir())
        if path.is_file() and path.name not in _OWN and path.suffix != ".safetensors"
    ]
    needed = sum(pending.bytes for pending in tensors.values())
    with staged(dense, needed + (1 << 20)) as directory:
        write_shards(directory, tensors, max_shard_bytes, progress)
        (directory / MANIFEST_FILE).unlink()  # part of the svd format only
        raw = read_json(compressed / "config.json")
        del raw["quantization_config"]
        (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for path in companions:
            shutil.copyfile(path, directory / path.name)
    return len(config.kv)


def _tensors(
    directory: Path, config: SvdCheckpointConfig, manifest: Manifest
) -> dict[str, Pending]:
    def read(name: str) -> torch.Tensor:
        path = directory / manifest.tensors[name].shard
        with shard_errors(directory), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def multiplied(path: str, dtype: torch.dtype) -> torch.Tensor:
        return LowRankFactors(read(f"{path}.A"), read(f"{path}.B")).dense().to(dtype)

    pending: dict[str, Pending] = {}
    added = config.tensors()
    for name, record in manifest.tensors.items():
        dtype = cast(DType, record.dtype)  # verify() accepts no other
        if name not in added:
            pending[name] = Pending(dtype, record.shape, partial(read, name))
        elif name.endswith(".A") and (path := name.removesuffix(".A")) in config.modules:
            module = config.modules[path]
            shape = (module.out_features, module.in_features)
            values = partial(multiplied, path, TORCH_DTYPES[dtype])
            pending[f"{path}.weight"] = Pending(dtype, shape, values)
    return pending
