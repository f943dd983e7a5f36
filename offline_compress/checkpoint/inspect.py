"""What a compressed checkpoint holds, after its shards are checked against its manifest."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from offline_compress.allocation import RankPlan
from offline_compress.checkpoint.measurements import MEASUREMENTS_FILE, Measurements
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import SvdCheckpointConfig, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import read_manifest


@dataclass(frozen=True)
class Inspection:
    """A verified checkpoint: what is stored, what was planned and what was measured."""

    config: SvdCheckpointConfig
    plan: RankPlan
    measured: Measurements
    shards: int
    bytes: int


def inspect(directory: Path) -> Inspection:
    """Verify `directory` and read it; raises CheckpointFormatError with every problem."""
    config = verify(directory)
    shards = read_manifest(directory).shards
    raw_plan = read_json(directory / "plan.json")
    try:
        plan = RankPlan.parse(raw_plan)
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
        config, plan, measured, len(shards), sum(record.bytes for record in shards.values())
    )
