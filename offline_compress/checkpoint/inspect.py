"""What a compressed checkpoint holds, after its shards are checked against its manifest."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedModel

from offline_compress import reference
from offline_compress.allocation import RankPlan
from offline_compress.checkpoint.measurements import MEASUREMENTS_FILE, Measurements
from offline_compress.families import family_of, layer_paths
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import SvdCheckpointConfig, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import read_manifest


@dataclass(frozen=True)
class Inspection:
    """A verified checkpoint: what is stored, and what was measured.

    The ranks of `plan` are those of config.json, which is served; plan.json adds the reasons.
    """

    config: SvdCheckpointConfig
    plan: RankPlan
    measured: Measurements
    shards: int
    bytes: int


def inspect(directory: Path) -> Inspection:
    """Verify `directory` and read it; raises CheckpointFormatError with every problem."""
    config = verify(directory)
    model = reference.check(directory, config)
    shards = read_manifest(directory).shards
    try:
        plan = read_plan(directory)
        measured = Measurements.model_validate(read_json(directory / MEASUREMENTS_FILE))
    except ValidationError as error:
        problems = [
            f"{error.title} {'.'.join(map(str, item['loc']))}: {item['msg']}"
            for item in error.errors()
        ]
        raise CheckpointFormatError(
            str(directory), problems, "copy plan.json and measurements.json again"
        ) from None
    return Inspection(
        config,
        _as_stored(directory, plan, model, config),
        measured,
        len(shards),
        sum(record.bytes for record in shards.values()),
    )


def read_plan(directory: Path) -> RankPlan:
    """plan.json as it was written, unverified; raises pydantic's ValidationError."""
    return RankPlan.parse(read_json(directory / "plan.json"))


def _as_stored(
    directory: Path, plan: RankPlan, model: PreTrainedModel, config: SvdCheckpointConfig
) -> RankPlan:
    family = family_of(model.config)
    paths = [
        *family.linear_paths(model.config),
        *(f"{layer}.{family.attention}" for layer in layer_paths(model.config)),
    ]
    if odd := set(paths) ^ (plan.matrices.keys() | plan.caches.keys()):
        problems = [f"plan.json and the model differ in {path}" for path in sorted(odd)]
        raise CheckpointFormatError(str(directory), problems, "copy plan.json again")
    matrices = {}
    for path, matrix in plan.matrices.items():
        module = config.modules.get(path)
        method = config.method if module else "dense"
        matrices[path] = matrix.model_copy(update={"module": module, "method": method})
    caches = {
        path: cache.model_copy(update={"projection": config.kv.get(path)})
        for path, cache in plan.caches.items()
    }
    return plan.model_copy(update={"matrices": matrices, "caches": caches})
