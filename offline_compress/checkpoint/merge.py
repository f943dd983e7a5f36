"""Several fine-tuned models, dense or stored as deltas, added up on their base."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from offline_compress import merging
from offline_compress.checkpoint.shards import Pending, stored_tensors, write_shards
from offline_compress.factors import DeltaFactors, of_parts
from offline_compress.merging import Combine, Reader
from offline_compress.progress import Progress, silent
from offline_compress.staging import ensure_vacant, staged
from offline_compress.weights import Source, SourceError, open_base, open_source
from vllm_svd.errors import SvdError
from vllm_svd.format import QUANT_METHOD, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import MANIFEST_FILE, read_manifest


def merge(
    base: str,
    models: Sequence[str],
    out: Path,
    *,
    ties: bool = False,
    keep: float = 0.2,
    scale: float = 1.0,
    progress: Progress = silent,
) -> None:
    """Write W_base + the combined differences of the models to a plain checkpoint `out`.

    Task arithmetic by default, TIES where asked (offline_compress.merging). One tensor of each
    model is in memory at a time. Raises SourceError for a model that is not of this base's shape.
    """
    ensure_vacant(out)
    dense = open_source(base)
    deltas = [merging.difference(dense.read, _reader(model, dense)) for model in models]
    combine = _combine(ties, keep, scale)
    combine([torch.ones(1)])  # a bad option is found before anything is read

    def joined(name: str) -> torch.Tensor:
        ((_, tensor),) = merging.merge([name], dense.read, deltas, combine)
        return tensor

    tensors = {
        name: Pending(dense.dtype_of(name), shape, partial(joined, name))
        for name, shape in dense.shapes.items()
    }
    needed = sum(pending.bytes for pending in tensors.values())
    with staged(out, needed + (1 << 20)) as directory:
        write_shards(directory, tensors, progress=progress)
        (directory / MANIFEST_FILE).unlink()  # part of the svd format only
        for path in (dense.directory / "config.json", *dense.companions()):
            shutil.copyfile(path, directory / path.name)


def _combine(elect: bool, keep: float, scale: float) -> Combine:
    if elect:
        return partial(merging.ties, keep=keep, scale=scale)
    return partial(merging.task_arithmetic, scale=scale)


def _reader(model: str, base: Source) -> Reader:
    """Reads the dense tensors of a fine-tuned model, whatever it is stored as."""
    directory = Path(model).expanduser()
    if (directory / "config.json").is_file():
        quantization = read_json(directory / "config.json").get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
            return _of_deltas(directory, base)
    source = open_source(model)
    _check_tensors(model, source.shapes, base)
    return source.read


def _check_tensors(model: str, shapes: Mapping[str, Sequence[int]], base: Source) -> None:
    if {name: tuple(shape) for name, shape in shapes.items()} != {
        name: tuple(shape) for name, shape in base.shapes.items()
    }:
        raise SourceError(
            f"{model} has other tensors than the base {base.name}\n"
            "Remedy: merge models that were fine-tuned from this base, with its vocabulary"
        )


def _of_deltas(directory: Path, base: Source) -> Reader:
    config = verify(directory)
    if set(config.deltas) != set(config.modules) or config.kv:
        raise SvdError(
            f"{directory} is compressed by {config.method}; accepted are dense models and deltas\n"
            "Remedy: make a dense model of it with offline-compress restore"
        )
    manifest = read_manifest(directory)
    packed = config.tensors()
    shapes = {
        name: record.shape for name, record in manifest.tensors.items() if name not in packed
    } | {
        f"{path}.weight": (module.out_features, module.in_features)
        for path, module in config.modules.items()
    }
    _check_tensors(str(directory), shapes, base)
    if config.deltas:
        open_base(config, base.directory)
    stored = stored_tensors(directory, manifest)

    def read(name: str) -> torch.Tensor:
        path = name.removesuffix(".weight")
        module = config.modules.get(path)
        if module is None or not name.endswith(".weight"):
            return stored(name)
        parts = {full.removeprefix(f"{path}."): stored(full) for full in module.tensors(path)}
        factors = of_parts(module, parts)
        assert isinstance(factors, DeltaFactors)  # every module is a delta
        return factors.on(base.read(name)).dense()

    return read
