"""`python -m benchmarks.engine`: decode steps of dense and compressed engines, in turn."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.engine.turns import Load, Report, measure, table
from benchmarks.machine import machine
from benchmarks.serving import checkpoint, results
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
    console = Console(width=130)
    logs = Path(tempfile.mkdtemp(prefix="benchmarks-engine-"))  # stays, to be read after a failure
    load = Load(
        text=text,
        batches=tuple(batch or [1]),
        input_len=input_len,
        output_len=output_len,
        rounds=rounds,
        enforce_eager=enforce_eager,
    )
    try:
        models = {"dense": dense} | named(compressed)
        quality = {
            name: checkpoint.evaluate(model, text, logs / f"{name}-evaluate.log").perplexity
            for name, model in models.items()
        }
        rows = [
            row
            for each in dtype or ["auto"]
            for row in measure(models, quality, load, each, logs / each)
        ]
    except BenchmarkError as error:
        console.print(f"\nError: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    report = Report(
        command=results.command_line("benchmarks.engine"),
        machine=machine(),
        input_len=input_len,
        output_len=output_len,
        rows=tuple(rows),
    )
    console.print(table(report))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
