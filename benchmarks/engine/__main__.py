"""`python -m benchmarks.engine`: decode steps of dense and compressed engines, in turn."""

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine.engines import started
from benchmarks.machine import machine
from benchmarks.serving import checkpoint, prompts, results
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.names import named


def main(
    dense: Annotated[Path, typer.Option(exists=True, file_okay=False, help="dense checkpoint")],
    compressed: Annotated[list[str], typer.Option(metavar="NAME=DIR", help="may be repeated")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="scored, and prompts")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON of every figure")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="repeatable; auto")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="requests; repeatable; 1")] = None,
    input_len: Annotated[int, typer.Option(min=4, help="tokens per prompt")] = 32,
    output_len: Annotated[int, typer.Option(min=2, help="tokens per answer")] = 96,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    enforce_eager: Annotated[bool, typer.Option(help="no compilation, on every engine")] = False,
) -> None:
    """Milliseconds of a decode step, and its ratio to dense in the same round: median and range.

    All engines live at once and take turns of one answer each, so that noise hits all alike.
    """
    models = {"dense": dense} | named(compressed)
    sizes = batch or [1]
    table = Table(title=f"{input_len} tokens of prompt, {output_len} of answer, {rounds} rounds")
    for column in ("dtype", "batch", "engine", "perplexity", "ms a step", "range", "x dense"):
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        quality = {
            name: checkpoint.evaluate(model, text, logs / f"{name}-evaluate.log").perplexity
            for name, model in models.items()
        }
        for precision in dtype or ["auto"]:
            arguments = {
                "dtype": precision,
                "max_model_len": 1024,
                "gpu_memory_utilization": 0.3,
                "kv_cache_memory_bytes": 1 << 28,
                "enforce_eager": enforce_eager,
                "enable_prefix_caching": False,
            }
            with started(models, arguments, logs) as engines:
                for size in sizes:
                    passages = prompts.cut_ids(dense, text, size * rounds, input_len)
                    for engine in engines.values():
                        engine.decode(passages[:size], output_len)  # warms up
                    times: dict[str, list[float]] = {name: [] for name in engines}
                    for turn in range(rounds):
                        for name, engine in engines.items():
                            hand = passages[turn::rounds][:size]
                            times[name].append(engine.decode(hand, output_len))
                    for name, seconds in times.items():
                        pairs = zip(times["dense"], seconds, strict=True)
                        ratios = [one / other for one, other in pairs]
                        row = {
                            "dtype": precision,
                            "batch": size,
                            "engine": name,
                            "perplexity": quality[name],
                            "seconds": seconds,
                            "times_dense": ratios,
                        }
                        rows.append(row)
                        table.add_row(
                            precision,
                            str(size),
                            name,
                            f"{quality[name]:.2f}",
                            f"{1e3 * median(seconds):.2f}",
                            f"{1e3 * min(seconds):.2f} - {1e3 * max(seconds):.2f}",
                            f"{median(ratios):.3f}",
                        )
    Console(width=130).print(table)
    if out is not None:
        found = {
            "command": results.command_line("benchmarks.engine"),
            "machine": machine().model_dump(mode="json"),
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def run() -> None:
    """The command, with errors in one line."""
    try:
        typer.run(main)
    except BenchmarkError as error:
        Console().print(f"\nError: {error}", style="red", markup=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
