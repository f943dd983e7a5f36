"""`python -m benchmarks.offline`: the quality laboratory, and a model to run it on."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.offline import variants
from benchmarks.offline.cache_bytes import cache_bytes
from benchmarks.offline.caches import CacheGrid, Wanted, quantised_point
from benchmarks.offline.compare import Scored
from benchmarks.offline.plots import plot
from benchmarks.offline.points import Point, measure, recipe_of
from benchmarks.offline.reference_model import train
from benchmarks.offline.results import Archive, Quality, write
from benchmarks.offline.tasks import Tasks
from offline_compress import preflight, reference
from offline_compress.calibration import split
from offline_compress.evaluation import default_bos, tokenize_file
from offline_compress.recipe import parse
from offline_compress.report import progress_bars
from offline_compress.weights import open_source
from vllm_svd.errors import SvdError
from vllm_svd.format import sha256

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("reference-model")(train)
app.command("cache-bytes")(cache_bytes)

Directory = Annotated[Path, typer.Argument(exists=True, file_okay=False)]
File = Annotated[Path, typer.Option(exists=True, dir_okay=False)]
_HELD_OUT = 16


@app.command()
def quality(
    model: Directory,
    calibration: File,
    text: Annotated[list[Path], typer.Option(exists=True, dir_okay=False, help="scored")],
    out: Annotated[Path | None, typer.Option(file_okay=False, help="results and plots")] = None,
    method: Annotated[list[str] | None, typer.Option(help="a variant")] = None,
    kept: Annotated[list[float] | None, typer.Option()] = None,
    kv_mode: Annotated[list[str] | None, typer.Option()] = None,
    kv_kept: Annotated[list[float] | None, typer.Option()] = None,
    kv_group: Annotated[list[int] | None, typer.Option(min=1, help="KV heads a latent")] = None,
    kv_store: Annotated[list[str] | None, typer.Option(help="model, int8, int4, tiers")] = None,
    kv_allocator: Annotated[list[str] | None, typer.Option(help="uniform, measured")] = None,
    kv_exact: Annotated[
        list[int] | None, typer.Option(min=0, help="first positions held as they are; 0: none")
    ] = None,
    kv_quantised: Annotated[
        list[str] | None, typer.Option(help="a dense cache in int8, int4 or int2 as well")
    ] = None,
    samples: Annotated[int, typer.Option(min=1)] = 64,
    context: Annotated[int, typer.Option(min=2)] = 512,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    windows: Annotated[int | None, typer.Option(min=1, help="scored of each text")] = None,
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="fine-tuned from; for impart")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="of lm-eval, where installed")] = None,
    task_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="YAML files of own tasks")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="documents of each")] = None,
) -> None:
    """Compress MODEL in every way asked for and compare each with the dense model on every --text.

    --text, --method, --kept, --task and all of --kv-... may be repeated. With --kv-mode and no
    --method only the cache is compressed. Points already in --out that were
    measured with the same recipe, model, texts and tasks are not measured again.
    """
    try:
        _quality(
            model,
            calibration,
            text,
            out,
            method,
            kept or [0.8, 0.6, 0.4, 0.2],
            CacheGrid(
                kv_mode or [],
                kv_kept or [0.5, 0.25],
                kv_group or [1],
                kv_store or ["model"],
                kv_allocator or ["uniform"],
                kv_exact or [0],
                kv_quantised or [],
            ),
            samples,
            context,
            batch,
            windows,
            base,
            Tasks(task or [], task_path, task_limit),
        )
    except SvdError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None


def _quality(
    model: Path,
    calibration: Path,
    text: list[Path],
    out: Path | None,
    method: list[str] | None,
    kept: list[float],
    caches: CacheGrid,
    samples: int,
    context: int,
    batch: int,
    windows: int | None,
    base: Path | None,
    tasks: Tasks,
) -> None:
    how = {"text": str(calibration), "samples": samples, "context": context}
    caches_only = method is None and bool(caches.modes or caches.quantised)
    wanted = [] if caches_only else list(variants.chosen(method, base).items())
    points_wanted = [
        Wanted(name, share, recipe_of(weights, share, **how))
        for share in kept
        for name, weights in wanted
    ]
    points_wanted += caches.wanted(how)
    baselines = caches.baselines()
    for each in points_wanted:  # before anything is loaded
        parse(each.recipe, "the command line")
    names = _names(text)
    source = open_source(str(model))
    tokenizer = preflight.load_tokenizer(source.directory)
    corpus = split(
        tokenize_file(tokenizer, calibration),
        samples=samples,
        held_out=_HELD_OUT,
        context=context,
        seed=0,
        bos=default_bos(tokenizer),
    )
    device = preflight.pick_device("auto")
    dense = reference.load(model, device, preflight.compute_dtype(device, source.torch_dtype))
    texts = [Scored(path, name, tokenizer, context, windows) for name, path in names.items()]
    archive = Archive(out / "points" / model.name) if out is not None else None
    points: list[Point] = []
    failed: list[str] = []
    inputs = _inputs([source.directory, *([base] if base else [])], [calibration, *text])
    facts = [inputs, windows, list(names), *tasks.facts]
    with progress_bars(Console(stderr=True)) as progress:
        exact = {scored.name: scored.compare(dense, dense, batch, progress) for scored in texts}
        exact_tasks = tasks.scores(dense, tokenizer, batch)
        whole = sum(map(source.bytes_of, source.shapes))
        points += [
            quantised_point(store, model, dense, whole, source.item_bytes, texts, batch, progress)
            for store in baselines
        ]
        for number, (name, share, recipe, held) in enumerate(points_wanted):
            key = _key(name, share, [recipe, *facts])
            point = archive.load(key) if archive else None
            try:
                point = point or measure(
                    name,
                    share,
                    recipe,
                    model,
                    dense,
                    texts,
                    tasks,
                    tokenizer,
                    corpus,
                    batch,
                    progress,
                    base,
                    held,
                )
            except SvdError as error:  # the other points are worth having
                failed.append(str(error))
            else:
                points.append(point)
                if archive:
                    archive.save(key, point)
            progress("points", number + 1, len(points_wanted))
    found = Quality(
        model=model.resolve().name,
        parameters=sum(parameter.numel() for parameter in dense.parameters()),
        checkpoint_bytes=whole,
        calibration=calibration.name,
        calibration_tokens=corpus.calibration.numel(),
        context=context,
        scored_tokens={scored.name: scored.tokens for scored in texts},
        dense=exact,
        dense_tasks=exact_tasks,
        points=tuple(points),
        machine=machine(),
    )
    Console(width=200).print(found.table())
    if out is not None:
        write(out / f"{found.model}.json", found.model_dump_json(indent=1) + "\n")
        write(out / f"{found.model}.md", found.markdown())
        plot(found, out)
    if failed:
        raise SvdError("\n".join(failed))


def _names(texts: list[Path]) -> dict[str, Path]:
    """The texts by name, with their directory where names alone are the same."""
    for parts in (1, 2):
        names = {"/".join(path.resolve().parts[-parts:]): path for path in texts}
        if len(names) == len(texts):
            return names
    raise SvdError(
        f"--text {', '.join(map(str, texts))}: names must differ\nRemedy: rename one of them"
    )


def _inputs(models: list[Path], texts: list[Path]) -> list[object]:
    """What a point depends on beside its recipe."""
    weights = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for model in models
        for path in model.glob("*.safetensors")
    )
    return [weights, [sha256(path) for path in texts], version("vllm-svd")]


def _key(name: str, share: float, facts: list[object]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return f"{name.replace(' ', '-')}-{share:g}-{digest}"


if __name__ == "__main__":
    app()
