"""What is measured of engines that take turns, and how it is shown."""

from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from benchmarks.engine.engines import started
from benchmarks.machine import Machine
from benchmarks.serving import prompts

_KV_BYTES = 1 << 28


class Steps(BaseModel):
    """Seconds of a decode step of one engine, a value a round, and times dense in that round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    batch: int
    engine: str
    perplexity: float
    seconds: tuple[float, ...]
    times_dense: tuple[float, ...]


class Report(BaseModel):
    """Everything that was measured, on what and with which versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str
    machine: Machine
    input_len: int
    output_len: int
    rows: tuple[Steps, ...]


class Load(BaseModel):
    """What every engine is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Path
    batches: tuple[int, ...]
    input_len: int
    output_len: int
    rounds: int
    enforce_eager: bool


def measure(
    models: dict[str, Path], quality: dict[str, float], load: Load, dtype: str, logs: Path
) -> list[Steps]:
    """All engines in one dtype, `dense` among them; raises BenchmarkError where one fails."""
    arguments = {
        "dtype": dtype,
        "max_model_len": load.input_len + load.output_len,
        "max_num_seqs": max(load.batches),
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": _KV_BYTES,
        "enforce_eager": load.enforce_eager,
        "enable_prefix_caching": False,
    }
    found = []
    with started(models, arguments, logs) as engines:
        for batch in load.batches:
            count = batch * load.rounds
            passages = prompts.cut_ids(models["dense"], load.text, count, load.input_len)
            hands = [passages[turn :: load.rounds] for turn in range(load.rounds)]
            for engine in engines.values():
                engine.decode(hands[0], load.output_len)  # warms up
            times: dict[str, list[float]] = {name: [] for name in engines}
            for hand in hands:
                for name, engine in engines.items():
                    times[name].append(engine.decode(hand, load.output_len))
            for name, seconds in times.items():
                pairs = zip(times["dense"], seconds, strict=True)
                found.append(
                    Steps(
                        dtype=dtype,
                        batch=batch,
                        engine=name,
                        perplexity=quality[name],
                        seconds=tuple(seconds),
                        times_dense=tuple(dense / other for dense, other in pairs),
                    )
                )
    return found


def table(report: Report) -> Table:
    """Medians, and the range of the rounds."""
    shown = Table(title=f"{report.input_len} tokens of prompt, {report.output_len} of answer")
    for column in ("dtype", "batch", "engine", "perplexity", "ms a step", "range", "x dense"):
        shown.add_column(column, justify="right")
    for row in report.rows:
        shown.add_row(
            row.dtype,
            str(row.batch),
            row.engine,
            f"{row.perplexity:.2f}",
            f"{1e3 * median(row.seconds):.2f}",
            f"{1e3 * min(row.seconds):.2f} - {1e3 * max(row.seconds):.2f}",
            f"{median(row.times_dense):.3f}",
        )
    return shown
