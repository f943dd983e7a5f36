"""The checkpoint that a compressed one was made from: factors multiplied back, bases dropped."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch

from offline_compress import reference
from offline_compress.checkpoint.measurements import MEASUREMENTS_FILE
from offline_compress.checkpoint.shards import (
    MAX_SHARD_BYTES,
    Pending,
    stored_tensors,
    write_shards,
)
from offline_compress.factors import DeltaFactors, of_parts
from offline_compress.progress import Progress, silent
from offline_compress.staging import ensure_vacant, staged
from offline_compress.weights import TORCH_DTYPES, DType, Source, open_base
from vllm_svd.format import Manifest, SvdCheckpointConfig, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import INDEX_FILE, MANIFEST_FILE, read_manifest

# Of the compressed checkpoint only; the rest beside the weights is the dense model's own.
_OWN = {"config.json", "recipe.yaml", "plan.json", "README.md", MEASUREMENTS_FILE}
_OWN |= {INDEX_FILE, MANIFEST_FILE}


class Dropped(NamedTuple):
    """What an ordinary checkpoint has no place for: K/V projections, and corrections of layers
    without a bias.
    """

    projections: int
    corrections: int


def restore(
    compressed: Path,
    dense: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    base: str | Path | None = None,
    progress: Progress = silent,
) -> Dropped:
    """Write what every artefact approximates, in the stored dtype, to a plain checkpoint `dense`.

    Weights that another method quantised stay as they are.
    Deltas are added to the weights of `base`, or of the model that the checkpoint names.
    Raises CheckpointFormatError for a damaged input and OutputError for an unwritable output.
    """
    ensure_vacant(dense)
    config = verify(compressed)
    reference.check(compressed, config)
    manifest = read_manifest(compressed)
    source = open_base(config, base) if config.deltas else None
    tensors = _tensors(compressed, config, manifest, source)
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
        if config.weights is not None:
            raw["quantization_config"] = config.weights
        (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for path in companions:
            shutil.copyfile(path, directory / path.name)
    corrected = (path for path, module in config.modules.items() if module.correction)
    return Dropped(
        len(config.kv), sum(f"{path}.bias" not in manifest.tensors for path in corrected)
    )


def _tensors(
    directory: Path, config: SvdCheckpointConfig, manifest: Manifest, base: Source | None
) -> dict[str, Pending]:
    read = stored_tensors(directory, manifest)

    def multiplied(path: str, dtype: torch.dtype) -> torch.Tensor:
        module = config.modules[path]
        parts = {name.removeprefix(f"{path}."): read(name) for name in module.tensors(path)}
        factors = of_parts(module, parts)
        if isinstance(factors, DeltaFactors) and base is not None:
            factors = factors.on(base.read(f"{path}.weight"))
        return factors.dense().to(dtype)

    def biased(path: str, dtype: torch.dtype) -> torch.Tensor:
        bias = read(f"{path}.correction").double()
        if f"{path}.bias" in manifest.tensors:
            bias = bias + read(f"{path}.bias").double()
        return bias.to(dtype)

    pending: dict[str, Pending] = {}
    added = config.tensors()
    corrected = {path for path, module in config.modules.items() if module.correction}
    owners = {
        name: path for path, module in config.modules.items() for name in module.tensors(path)
    }
    dtype = next(cast(DType, r.dtype) for name, r in manifest.tensors.items() if name not in added)
    for name, record in manifest.tensors.items():
        if name not in added:
            # Another method's dtypes are copied; verify() accepts none of them beside modules.
            stored = cast(DType, record.dtype)
            if name.removesuffix(".bias") in corrected and name.endswith(".bias"):
                path = name.removesuffix(".bias")
                values = partial(biased, path, TORCH_DTYPES[stored])
                pending[name] = Pending(stored, record.shape, values)
            else:
                pending[name] = Pending(stored, record.shape, partial(read, name))
        elif (path := owners.get(name, "")) and f"{path}.weight" not in pending:
            module = config.modules[path]
            shape = (module.out_features, module.in_features)
            values = partial(multiplied, path, TORCH_DTYPES[dtype])
            pending[f"{path}.weight"] = Pending(dtype, shape, values)
    return pending
