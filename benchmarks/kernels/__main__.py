"""`python -m benchmarks.kernels`: decode attention of latent caches beside the dense kernel."""

import json
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.geometry import GEOMETRIES, VARIANTS, Step
from benchmarks.kernels.kernels import dense, latent
from benchmarks.kernels.timing import alternate, copy_bandwidth, matrix_speeds
from benchmarks.machine import machine

# Where nothing is asked for: a GPU has room for many long contexts.
BATCHES = {"cpu": [1, 8, 32], "cuda": [1, 8, 64]}
CONTEXTS = {"cpu": [4096], "cuda": [8192]}


def main(
    geometry: Annotated[str, typer.Option(help=", ".join(GEOMETRIES))] = "llama-3.1-8b",
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="requests; repeatable; 1, 8, 32, or 1, 8, 64 on a GPU"),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="tokens; repeatable; 4096, or 8192 on a GPU"),
    ] = None,
    prompts: Annotated[
        bool, typer.Option(help="all tokens of a context at once, as prompts")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON of every figure")] = None,
) -> None:
    """Time one step of one layer, in bf16: median, range and ratio to dense of each kernel.

    `MB` are those of the cache that must be read. `of copy` is what part of the bandwidth of a copy
    they are read at, `of matrix` what part of the speed of matrix products the operations are done
    at; what fits a cache of the machine is read faster than a copy.
    """
    if geometry not in GEOMETRIES:
        accepted = ", ".join(GEOMETRIES)
        raise typer.BadParameter(f"{geometry!r}; accepted are {accepted}", param_hint="--geometry")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    bandwidth = copy_bandwidth(device)
    speeds = matrix_speeds(device)
    fastest = max(speeds, key=speeds.__getitem__)
    table = Table(
        title=f"{geometry}: {bandwidth / 1e9:.1f} GB/s of a copy, "
        f"{speeds[fastest] / 1e12:.2f} TFLOP/s of products in {fastest}"
    )
    for column in (
        *("batch", "context", "kernel", "ms", "range", "x dense", "MB", "of copy"),
        *("GFLOP", "of matrix"),
    ):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    rows = []
    for requests in batch or BATCHES[device.type]:
        for tokens in context or CONTEXTS[device.type]:
            queries = tokens if prompts else 1
            step = Step(GEOMETRIES[geometry], requests, tokens, queries, dtype, device)
            kernels = [dense(step), *(latent(step, variant) for variant in VARIANTS)]
            times = alternate([kernel.run for kernel in kernels], device, rounds)
            for kernel, seconds in zip(kernels, times, strict=True):
                ratios = [one / other for one, other in zip(times[0], seconds, strict=True)]
                bandwidth_share = kernel.bytes / bandwidth / median(seconds)
                matrix_share = kernel.operations / speeds[fastest] / median(seconds)
                row = {
                    "geometry": geometry,
                    "batch": requests,
                    "context": tokens,
                    "queries": queries,
                    "kernel": kernel.name,
                    "seconds": seconds,
                    "times_dense": ratios,
                    "bytes": kernel.bytes,
                    "operations": kernel.operations,
                    "bandwidth_share": bandwidth_share,
                    "matrix_share": matrix_share,
                }
                rows.append(row)
                table.add_row(
                    str(requests),
                    str(tokens),
                    kernel.name,
                    f"{1e3 * median(seconds):.3f}",
                    f"{1e3 * min(seconds):.3f} - {1e3 * max(seconds):.3f}",
                    f"{median(ratios):.2f}",
                    f"{kernel.bytes / 1e6:.1f}",
                    f"{bandwidth_share:.0%}",
                    f"{kernel.operations / 1e9:.2f}",
                    f"{matrix_share:.0%}",
                )
    Console(width=130).print(table)
    if out is not None:
        found = {
            "machine": machine().model_dump(mode="json"),
            "bandwidth": bandwidth,
            "matrix_speed": speeds[fastest],
            "matrix_dtype": fastest,
            "matrix_speeds": speeds,
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
