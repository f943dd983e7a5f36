"""The compressed checkpoint directory (docs/checkpoint_format.md), complete or absent."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from offline_compress import reference
from offline_compress.allocation import RankPlan
from offline_compress.checkpoint.card import card
from offline_compress.checkpoint.measurements import MEASUREMENTS_FILE, Measurements
from offline_compress.checkpoint.shards import (
    MAX_SHARD_BYTES,
    Pending,
    write_shards,
)
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe
from offline_compress.weights import Source, reference_to
from vllm_svd.format import KVProjection, Module, SvdCheckpointConfig, verify

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
    modules: Mapping[str, Module],
    kv: Mapping[str, KVProjection],
    read: Callable[[str], torch.Tensor],
    measured: Measurements,
    base: Source | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write into a staged directory and verify.

    `read` gives the tensors of `modules` and `kv` by their names, in the dtype to store, when their
    shard's turn comes. All others are copied from the source bit for bit; no path of this machine
    is written. Raises CheckpointFormatError if what was written does not verify.
    """
    recipe = recipe.without_directories()
    config = SvdCheckpointConfig(
        method=recipe.weights.method.name if modules else "dense",
        modules=dict(modules),
        kv=dict(kv),
        base=reference_to(base, modules) if base is not None and modules else None,
        weights=dict(source.quantised.config) if source.quantised else None,
    )
    write_shards(directory, _tensors(source, config, read), max_shard_bytes, progress)
    _write_config(source.directory / "config.json", directory / "config.json", config)
    for companion in source.companions():
        shutil.copyfile(companion, directory / companion.name)
    (directory / "recipe.yaml").write_text(recipe.yaml())
    (directory / "plan.json").write_text(plan.model_dump_json(indent=1) + "\n")
    (directory / MEASUREMENTS_FILE).write_text(measured.model_dump_json(indent=1) + "\n")
    (directory / "README.md").write_text(card(plan, recipe, measured))
    reference.check(directory, verify(directory))


def _tensors(
    source: Source, config: SvdCheckpointConfig, read: Callable[[str], torch.Tensor]
) -> dict[str, Pending]:
    """Every tensor to store, in the order of the model, factors in the place of their weight."""
    made: dict[str, Pending] = {}
    for name, stored in config.tensors().items():
        made[name] = Pending(stored.dtype or source.dtype, stored.shape, partial(read, name))
    pending: dict[str, Pending] = {}
    for name in source.shapes:
        path = name.removesuffix(".weight")
        module = config.modules.get(path) if name.endswith(".weight") else None
        if module is None:
            for part, (dtype, size) in source.on_disk(name).items():
                pending[part] = Pending(dtype, size, partial(source.read_stored, part))
        else:
            pending |= {part: made[part] for part in module.tensors(path)}
    return pending | made  # and the bases


def _write_config(dense: Path, path: Path, config: SvdCheckpointConfig) -> None:
    raw = json.loads(dense.read_text())
    raw["quantization_config"] = config.model_dump(mode="json")
    path.write_text(json.dumps(raw, indent=2) + "\n")
