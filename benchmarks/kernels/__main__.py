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
from benchmarks.kernels.timing import alternate, matrix_speed, read_bandwidth
from benchmarks.machine import machine


def main(
    geometry: Annotated[str, typer.Option(help=", ".join(GEOMETRIES))] = "llama-3.1-8b",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="requests; repeatable")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="tokens; repeatable")] = None,
    prompts: Annotated[
        bool, typer.Option(help="all tokens of a context at once, as prompts")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON of every figure")] = None,
) -> None:
    """Time one step of one layer, in bf16: median, range and ratio to dense of each kernel.

    `bytes` are those of the cache that must be read, `share` what part of the machine's copy
    bandwidth, or of its matrix speed where arithmetic is the higher floor, the kernel reaches.
    """
    if geometry not in GEOMETRIES:
        accepted = ", ".join(GEOMETRIES)
        raise typer.BadParameter(f"{geometry!r}; accepted are {accepted}", param_hint="--geometry")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    # A CPU without bf16 units computes in fp32.
    bandwidth = read_bandwidth(device)
    speed = matrix_speed(device, dtype if device.type == "cuda" else torch.float32)
    table = Table(title=f"{geometry}: {bandwidth / 1e9:.1f} GB/s, {speed / 1e12:.2f} TFLOP/s")
    for column in ("batch", "context", "kernel", "ms", "range", "x dense", "MB", "floor", "share"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    rows = []
    for requests in batch or [1, 8, 32]:
        for tokens in context or [4096]:
            queries = tokens if prompts else 1
            step = Step(GEOMETRIES[geometry], requests, tokens, queries, dtype, device)
            kernels = [dense(step), *(latent(step, variant) for variant in VARIANTS)]
            times = alternate([kernel.run for kernel in kernels], device, rounds)
            for kernel, seconds in zip(kernels, times, strict=True):
                ratios = [one / other for one, other in zip(times[0], seconds, strict=True)]
                floors = {"bytes": kernel.bytes / bandwidth, "FLOPs": kernel.operations / speed}
                floor = max(floors, key=floors.__getitem__)
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
                    "floor": floor,
                    "share": floors[floor] / median(seconds),
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
                    floor,
                    f"{row['share']:.0%}",
                )
    Console(width=130).print(table)
    if out is not None:
        found = {
            "machine": machine().model_dump(mode="json"),
            "bandwidth": bandwidth,
            "matrix_speed": speed,
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
