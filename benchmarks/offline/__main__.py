"""`python -m benchmarks.offline`: perplexity of methods and K/V projections as a table and JSON."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.offline.quality import Axes, Laboratory, Quality, measure, variants
from offline_compress.report import progress_bars
from vllm_svd.errors import SvdError

Shares = Annotated[list[float] | None, typer.Option()]
Names = Annotated[list[str] | None, typer.Option()]
Modes = Annotated[list[str] | None, typer.Option("--kv-mode")]


def main(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    calibration: Annotated[Path, typer.Option(exists=True, dir_okay=False)],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="scored")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file")] = None,
    method: Names = None,
    kept: Shares = None,
    kv_mode: Modes = None,
    kv_kept: Shares = None,
    samples: Annotated[int, typer.Option(min=1)] = 64,
    context: Annotated[int, typer.Option(min=2)] = 512,
) -> None:
    """Compress MODEL in every way asked for and print the perplexity of each on TEXT.

    --method, --kept, --kv-mode and --kv-kept may be repeated.
    """
    axes: Axes = {
        "methods": method or ["svd", "asvd", "svd_llm"],
        "kept": kept or [0.8, 0.6, 0.4],
        "modes": kv_mode or ["pre", "post"],
        "kv_kept": kv_kept or [0.5, 0.25],
    }
    try:
        variants(**axes)  # before anything is loaded
        with progress_bars(Console(stderr=True)) as progress:
            laboratory = Laboratory.of(
                model, calibration, text, samples=samples, context=context, progress=progress
            )
            dense = laboratory.score(laboratory.model)
            points = tuple(measure(laboratory, **axes, dense=dense))
    except SvdError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    found = Quality(
        model=model.name,
        calibration=calibration.name,
        calibration_tokens=laboratory.windows.numel(),
        text=text.name,
        scored_tokens=len(laboratory.tokens),
        context=context,
        dense_perplexity=dense,
        points=points,
        machine=machine(),
    )
    Console().print(_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(found.model_dump_json(indent=2) + "\n")
        partial.replace(out)


def _table(found: Quality) -> Table:
    table = Table(
        title=f"{found.model}: dense perplexity {found.dense_perplexity:.3f} on {found.text}"
    )
    for column in ("compressed", "kept", "perplexity", "change", "checkpoint bytes", "KV B/token"):
        table.add_column(column, justify="left" if column == "compressed" else "right")
    for point in found.points:
        table.add_row(
            point.what,
            f"{point.kept:g}",
            f"{point.perplexity:.3f}",
            f"{point.change_percent:+.2f} %",
            f"{point.checkpoint_bytes:,}",
            f"{point.kv_bytes_per_token:,}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
