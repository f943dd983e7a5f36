"""`offline-compress`: run, plan, inspect, evaluate, restore and merge."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from offline_compress import staging
from offline_compress.progress import Progress, silent
from vllm_svd import __version__
from vllm_svd.errors import SvdError

DEBUG = "OFFLINE_COMPRESS_DEBUG"

app = typer.Typer(
    help="Compress a Hugging Face decoder checkpoint for vllm serve.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Device(StrEnum):
    """Where the model runs; auto is CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[str, typer.Argument(help="Directory of a dense checkpoint, or a hub id.")]
Recipe = Annotated[Path | None, typer.Option(help="Recipe in YAML; flags override its fields.")]
Method = Annotated[
    str | None, typer.Option(help="svd, asvd, svd_llm, ...: docs/methods.md.  [default: svd_llm]")
]
Allocator = Annotated[
    str | None, typer.Option(help="Who splits the budget among matrices.  [default: uniform]")
]
Kept = Annotated[
    float | None,
    typer.Option(help="Fraction of the matrices' bytes that stays; 1 is dense.  [default: 0.8]"),
]
KVOnly = Annotated[
    bool, typer.Option("--kv-only", help="Leave the weights as they are, dense or quantised.")
]
KVKept = Annotated[
    float | None,
    typer.Option(help="Fraction of the cache's bytes that stays; 1 is dense.  [default: 0.5]"),
]
KVMode = Annotated[
    str | None,
    typer.Option(help="pre or post: project keys before or after RoPE.  [default: pre]"),
]
KVGroup = Annotated[
    int | None, typer.Option(help="Neighbouring KV heads that share a latent.  [default: 1]")
]
KVStore = Annotated[
    str | None,
    typer.Option(help="model, fp8_e4m3, int8, int4 or tiers of bits.  [default: model]"),
]
KVAllocator = Annotated[
    str | None,
    typer.Option(help="uniform, or measured: KL saved per byte cached.  [default: uniform]"),
]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text to calibrate on.")]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.  [default: 64]")]
Seed = Annotated[int | None, typer.Option(help="Seed of the windows' offsets.  [default: 0]")]
DeviceName = Annotated[str | None, typer.Option(help="auto, cpu or cuda.  [default: auto]")]
Base = Annotated[
    str | None, typer.Option(help="Model that deltas are differences from; default: as stored.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offline-compress {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it.", callback=_show_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option(envvar=DEBUG, help="Show tracebacks.")] = False,
) -> None:
    del version
    if debug:
        os.environ[DEBUG] = "1"


@app.command()
def run(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    recipe: Recipe = None,
    method: Method = None,
    allocator: Allocator = None,
    kept: Kept = None,
    kv_only: KVOnly = False,
    kv_kept: KVKept = None,
    kv_mode: KVMode = None,
    kv_group: KVGroup = None,
    kv_store: KVStore = None,
    kv_allocator: KVAllocator = None,
    text: Text = None,
    samples: Samples = None,
    seed: Seed = None,
    device: DeviceName = None,
) -> None:
    """Compress MODEL into OUT."""
    from offline_compress.calibration import process_group
    from offline_compress.checkpoint import read_plan
    from offline_compress.pipeline import compress
    from offline_compress.preflight import prepare_run
    from offline_compress.recipe import load_valid
    from offline_compress.report import cache_table, result_table
    from offline_compress.workspace import forsaken

    cache = _cache_flags(kv_kept, kv_mode, kv_group, kv_store, kv_allocator)
    flags = _flags(method, allocator, kept, kv_only, text, samples, seed, device) | cache
    wanted, invalid = load_valid(recipe, flags)
    if invalid is not None:
        prepare_run(wanted, model, out, invalid)  # raises it, with all else that is wrong
    for path, size in staging.leftovers(out).items():
        typer.echo(
            f"note: {path} ({size:,} bytes) was left by a run that was killed, or is being "
            "written by another; remove it in the first case",
            err=True,
        )
    with process_group(wanted.calibration.device) as workers, _progress(workers.first) as progress:
        measured = compress(wanted, model, out, progress)
    if measured is not None:  # under torchrun the first process speaks for all
        for path, size in forsaken(out).items():
            typer.echo(
                f"note: {path} ({size:,} bytes) was left by a run of another recipe that was "
                "killed, or is used by one that is at work; remove it in the first case",
                err=True,
            )
        made = read_plan(out)
        tables = [cache_table(made)] if made.projected else []  # `plan` can only guess at some
        _print(*tables, result_table(measured))
        use = f"vllm serve {out}"
        if wanted.weights.method.base_model is not None:
            use = f"to serve it, offline-compress restore {out} DENSE_DIR"
        typer.echo(f"{out} is complete: {use}")


@app.command()
def plan(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="Not written to.")] = None,
    recipe: Recipe = None,
    method: Method = None,
    allocator: Allocator = None,
    kept: Kept = None,
    kv_only: KVOnly = False,
    kv_kept: KVKept = None,
    kv_mode: KVMode = None,
    kv_group: KVGroup = None,
    kv_store: KVStore = None,
    kv_allocator: KVAllocator = None,
    text: Text = None,
    samples: Samples = None,
    seed: Seed = None,
    device: DeviceName = None,
) -> None:
    """Check the options of `run` and print its ranks, bytes and memory; computes nothing."""
    from offline_compress.preflight import prepare_plan
    from offline_compress.recipe import load_valid
    from offline_compress.report import plan_tables

    cache = _cache_flags(kv_kept, kv_mode, kv_group, kv_store, kv_allocator)
    flags = _flags(method, allocator, kept, kv_only, text, samples, seed, device) | cache
    wanted, invalid = load_valid(recipe, flags)
    _print(*plan_tables(prepare_plan(wanted, model, out, invalid)))


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(help="A compressed checkpoint.")], as_json: Json = False
) -> None:
    """Verify OUT and print what it holds."""
    from offline_compress.checkpoint import inspect as read
    from offline_compress.report import inspection_json, plan_tables, result_table

    found = read(out)
    if as_json:
        typer.echo(json.dumps(inspection_json(found), indent=1))
        return
    _print(*plan_tables(found.plan), result_table(found.measured))
    typer.echo(f"{found.config.method}: {found.shards} shards of {found.bytes:,} bytes, verified")


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="A dense or compressed checkpoint.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens the model sees at a time.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    device: Annotated[Device, typer.Option(help="auto, cpu or cuda.")] = Device.auto,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Print the perplexity of DIRECTORY on a text."""
    from dataclasses import asdict

    from offline_compress import reference
    from offline_compress.evaluation import perplexity
    from offline_compress.preflight import prepare_evaluation

    ready = prepare_evaluation(directory, text, context, device)
    network = reference.load(directory, ready.device, ready.dtype, base)
    with _progress() as progress:
        found = perplexity(network, ready.tokens, context, batch, ready.bos, progress)
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else str(found))


@app.command()
def restore(
    out: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    dense: Annotated[Path, typer.Argument(metavar="DENSE_DIR", help="Directory to create.")],
    base: Base = None,
) -> None:
    """Multiply the factors of OUT back into a plain dense checkpoint."""
    from offline_compress.checkpoint import restore as multiply_back

    with _progress() as progress:
        dropped = multiply_back(out, dense, base=base, progress=progress)
    if dropped.projections:
        typer.echo(
            f"note: a dense checkpoint cannot hold K/V projections; {dropped.projections} were "
            f"dropped, so {dense} caches every channel"
        )
    if dropped.corrections:
        typer.echo(
            f"note: {dropped.corrections} corrections of layers without a bias were dropped; "
            f"evaluate {dense} before you use it"
        )
    typer.echo(f"{dense} is complete")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models, dense or deltas.")],
    base: Annotated[str, typer.Option(help="The model that all of them were fine-tuned from.")],
    ties: Annotated[bool, typer.Option(help="Trim, elect signs and average.")] = False,
    keep: Annotated[float, typer.Option(help="Of each delta, with --ties.")] = 0.2,
    scale: Annotated[float, typer.Option(help="Of the merged delta.")] = 1.0,
) -> None:
    """Add up what MODELS learnt and write BASE with all of it, dense, to OUT."""
    from offline_compress.checkpoint import merge as add_up

    with _progress() as progress:
        add_up(base, models, out, ties=ties, keep=keep, scale=scale, progress=progress)
    typer.echo(f"{out} is complete")


def main() -> None:
    """The console entry: one message and exit code 1 for a user's error, no traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    exit_on_signals()
    try:
        app()
    except SvdError as error:
        if os.environ.get(DEBUG):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except MemoryError as error:
        _out_of_memory(error)
    except RuntimeError as error:  # torch's own, on a device and on the host
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        _out_of_memory(error)


def _out_of_memory(error: Exception) -> None:
    if os.environ.get(DEBUG):
        raise error
    typer.echo(
        f"error: out of memory: {str(error).partition(chr(10))[0]}\nRemedy: lower "
        "calibration.batch or calibration.context, or use --device cpu; offline-compress plan "
        "prints what is needed",
        err=True,
    )
    sys.exit(1)


def exit_on_signals() -> None:
    """SIGTERM exits with 143, Ctrl-C with 130, a hang-up with 129; nothing is left half-written."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, _stop)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    # Not an exception: one raised inside a library's import is swallowed or comes out as another.
    staging.abandon()
    Console(stderr=True).show_cursor()
    os._exit(128 + number)


@contextmanager
def _progress(shown: bool = True) -> Iterator[Progress]:
    from offline_compress.report import progress_bars

    if not shown:
        yield silent
        return
    with progress_bars(Console(stderr=True)) as progress:
        yield progress


def _flags(
    method: str | None,
    allocator: str | None,
    kept: float | None,
    kv_only: bool,
    text: Path | None,
    samples: int | None,
    seed: int | None,
    device: str | None,
) -> dict[str, Any]:
    return {
        "--method": method,
        "--allocator": allocator,
        "--kept": kept,
        "--kv-only": 1.0 if kv_only else None,
        "--text": text and str(text),
        "--samples": samples,
        "--seed": seed,
        "--device": device,
    }


def _cache_flags(
    kept: float | None,
    mode: str | None,
    group: int | None,
    store: str | None,
    allocator: str | None,
) -> dict[str, Any]:
    return {
        "--kv-kept": kept,
        "--kv-mode": mode,
        "--kv-group": group,
        "--kv-store": store,
        "--kv-allocator": allocator,
    }


def _print(*tables: Any) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width; do not wrap to 80
    for table in tables:
        console.print(table)
