"""`python -m benchmarks.serving`: dense and compressed servers compared under the same load."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.serving import output, report, table
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.names import named
from benchmarks.serving.progress import console, step
from benchmarks.serving.protocol import Protocol
from benchmarks.serving.run import compare


def main(
    dense: Annotated[Path, typer.Option(exists=True, file_okay=False, help="dense checkpoint")],
    compressed: Annotated[list[str], typer.Option(metavar="NAME=DIR", help="may be repeated")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="scored, and prompts")],
    out: Annotated[Path, typer.Option(file_okay=False, help="absent, empty or an earlier report")],
    kv_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            help="bytes of KV cache of every server; best what half of the load needs when dense",
        ),
    ],
    requests: Annotated[int, typer.Option(min=1, help="per repeat")] = 64,
    input_len: Annotated[int, typer.Option(min=4, help="tokens per prompt")] = 256,
    output_len: Annotated[int, typer.Option(min=2, help="tokens per answer")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="requests at a time")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="loads per server")] = 3,
    prompts: Annotated[
        Literal["text", "random"], typer.Option(help="passages of --text, or random token ids")
    ] = "text",
    max_model_len: Annotated[int, typer.Option(min=8)] = 1024,
    enforce_eager: Annotated[
        bool, typer.Option(help="no compilation and no CUDA graphs, on every server alike")
    ] = False,
    server_arg: Annotated[
        list[str] | None, typer.Option(help="one more vLLM flag for every server; may be repeated")
    ] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="seconds per server")] = 300,
    load_timeout: Annotated[float, typer.Option(min=1, help="seconds per repeat")] = 300,
) -> None:
    """Serve every checkpoint in turn with the same flags and KV bytes, send the same load, report.

    OUT gets report.html, report.json, PNG plots and raw/ with logs and vLLM's own results.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        protocol = Protocol(
            kv_bytes=kv_bytes,
            requests=requests,
            input_len=input_len,
            output_len=output_len,
            concurrency=concurrency,
            repeats=repeats,
            prompts=prompts,
            max_model_len=max_model_len,
            enforce_eager=enforce_eager,
            server_args=tuple(server_arg or ()),
            start_timeout=start_timeout,
            load_timeout=load_timeout,
        )
        models = {"dense": dense} | named(compressed)
        output.prepare(out)
        comparison = compare(models, text, protocol, out)
        with step("report") as current:
            current.note(str(report.write(comparison, out)))
    except BenchmarkError as error:
        console.print(f"\nError: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(table.terminal(comparison), soft_wrap=False)


if __name__ == "__main__":
    typer.run(main)
