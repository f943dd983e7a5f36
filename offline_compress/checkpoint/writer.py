"""The compressed checkpoint directory (docs/checkpoint_format.md), complete or absent."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from offline_compress import reference
from offline_compress.allocation import RankPlan
from offline_compress.checkpoint.card import card
from offline_compress.checkpoint.measurements import MEASUREMENTS_FILE, Measurements
from offline_compress.checkpoint.shards import (
    MAX_SHARD_BYTES,
    STORED_AS,
    Pending,
    write_shards,
)
from offline_compress.factors import Factors
from offline_compress.kv.projection import KVBases
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe
from offline_compress.weights import Source, reference_to
from vllm_svd.format import SvdCheckpointConfig, verify

_HEADROOM = 1 << 20  # config, index, manifest, plan and card


def bytes_needed(source: Source, plan: RankPlan) -> int:
    """Disk space that the checkpoint will take, with a little headroom."""
    companions = sum(path.stat().st_size for path in source.companions())
    return plan.totals.checkpoint_bytes + companions + _HEADROOM


def write(
    directory: Path,
    *,
    source: Source,
    recipe: CompressionRecipe,
    plan: RankPlan,
    factors: Mapping[str, Factors],
    bases: Mapping[str, KVBases],
    measured: Measurements,
    base: Source | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write into a staged directory and verify; factors and bases come in the dtype to store.

    Tensors that are not compressed are copied from the source bit for bit; no path of this machine
    is written. Raises CheckpointFormatError if what was written does not verify.
    """
    recipe = recipe.without_directories()
    config = SvdCheckpointConfig(
        method=recipe.weights.method.name if factors else "dense",
        modules={path: factor.config() for path, factor in factors.items()},
        kv={path: basis.config for path, basis in bases.items()},
        base=reference_to(base, factors) if base is not None and factors else None,
    )
    write_shards(directory, _tensors(source, factors, bases), max_shard_bytes, progress)
    _write_config(source.directory / "config.json", directory / "config.json", config)
    for companion in source.companions():
        shutil.copyfile(companion, directory / companion.name)
    (directory / "recipe.yaml").write_text(recipe.yaml())
    (directory / "plan.json").write_text(plan.model_dump_json(indent=1) + "\n")
    (directory / MEASUREMENTS_FILE).write_text(measured.model_dump_json(indent=1) + "\n")
    (directory / "README.md").write_text(card(plan, recipe, measured))
    reference.check(directory, verify(directory))


def _tensors(
    source: Source, factors: Mapping[str, Factors], bases: Mapping[str, KVBases]
) -> dict[str, Pending]:
    """Every tensor to store, in the order of the model, factors in the place of their weight."""
    pending: dict[str, Pending] = {}
    for name, shape in source.shapes.items():
        factor = factors.get(name.removesuffix(".weight"))
        if factor is None or not name.endswith(".weight"):
            pending[name] = Pending(source.dtype_of(name), shape, partial(source.read, name))
            continue
        for part, tensor in factor.tensors(name.removesuffix(".weight")).items():
            pending[part] = _held(tensor)
    for path, basis in bases.items():
        for name, tensor in basis.tensors(path).items():
            pending[name] = _held(tensor)
    return pending


def _held(tensor: torch.Tensor) -> Pending:
    return Pending(STORED_AS[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def _write_config(dense: Path, path: Path, config: SvdCheckpointConfig) -> None:
    raw = json.loads(dense.read_text())
    raw["quantization_config"] = config.model_dump(mode="json")
    path.write_text(json.dumps(raw, indent=2) + "\n")
