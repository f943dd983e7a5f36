"""Plans, inspections and progress in the terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from offline_compress.allocation import RankPlan
from offline_compress.checkpoint import Inspection, Measurements
from offline_compress.cost import expected_seconds
from offline_compress.progress import Progress


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """One bar per stage; a stage that starts over gets a new bar."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=console)
    current: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        bars.start()  # at the first report: an error before it stays the only output
        if stage not in current:
            current[stage] = bars.add_task(stage, total=total)
        bars.update(current[stage], completed=done)
        if done >= total:
            del current[stage]

    try:
        yield show
    finally:
        if bars.tasks:
            bars.stop()


def plan_tables(plan: RankPlan) -> Iterator[Table | Text]:
    """Ranks per matrix and per cache, the totals, then memory and warnings."""
    matrices = Table("matrix", "shape", "method", "stored as", "bytes", "kept", "why dense")
    for path, matrix in plan.matrices.items():
        size, dense = matrix.bytes(plan.item_bytes), matrix.dense_bytes(plan.item_bytes)
        matrices.add_row(
            path,
            f"{matrix.out_features} x {matrix.in_features}",
            matrix.method,
            matrix.module.label if matrix.module else "-",
            f"{size:,}",
            f"{size / dense:.3f}",
            matrix.reason or "",
        )
    yield matrices
    yield cache_table(plan)
    totals = plan.totals
    summary = Table("", "dense", "compressed", "kept")
    for label, dense, compressed in (
        ("bytes of linear layers", totals.linear_bytes_dense, totals.linear_bytes),
        ("checkpoint bytes", totals.checkpoint_bytes_dense, totals.checkpoint_bytes),
        ("KV bytes per token", totals.kv_bytes_per_token_dense, totals.kv_bytes_per_token),
    ):
        summary.add_row(label, f"{dense:,}", f"{compressed:,}", f"{compressed / dense:.3f}")
    yield summary
    yield _memory(plan)


def cache_table(plan: RankPlan) -> Table:
    """Ranks and stores of every cache."""
    caches = Table(
        *("attention", "mode", "KV heads a latent", "keys", "values"),
        *("KV bytes per token", "why dense"),
    )
    for path, cache in plan.caches.items():
        ranks = cache.projection
        caches.add_row(
            path,
            ranks.mode if ranks else "dense",
            str(ranks.group if ranks else "-"),
            ranks.label("key") if ranks else "-",
            ranks.label("value") if ranks else "-",
            f"{cache.bytes(plan.item_bytes)} of {cache.dense_bytes(plan.item_bytes)}",
            cache.reason or "",
        )
    return caches


def _memory(plan: RankPlan) -> Text:
    cost = plan.calibration
    seconds = expected_seconds(cost)
    lines = [
        "expected of run, with fp32 weights as on a CPU:",
        f"  device: {cost.block_bytes:,} bytes of one block, dense and compressed, "
        f"{cost.gram_bytes:,} of its moments and {cost.workspace_bytes:,} of workspace, beside one "
        "batch of activations"
        + (f"; {cost.model_bytes:,} while the whole model is read" if cost.model_bytes else ""),
        f"  host: {cost.hidden_bytes:,} bytes of hidden states, in a mapped file above "
        "calibration.host_memory_gib",
        f"  work directory: {cost.work_bytes:,} bytes",
        f"  time: {_duration(seconds)} at the speed of this machine's matrix products, of which "
        f"{cost.forward_operations:.2e} operations for passes of the model and "
        f"{cost.factor_operations:.2e} for moments and factorisations",
        *(f"warning: {warning}" for warning in plan.warnings),
    ]
    return Text("\n".join(lines))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def result_table(measured: Measurements) -> Table:
    """Perplexity, and the spread of the errors."""
    table = Table("measured on held-out text", "dense", "compressed")
    table.add_row("perplexity", f"{measured.perplexity_dense:.3f}", f"{measured.perplexity:.3f}")
    table.add_row("KL to dense, nats per token", "0", f"{measured.kl_to_dense:.2e}")
    table.add_row("same most likely token", "1", f"{measured.top1_agreement:.3f}")
    rows: Mapping[str, list[float]] = {
        "largest output error": [
            matrix.held_out for matrix in measured.matrices.values() if matrix.held_out is not None
        ],
        "largest K error": [cache.k_error for cache in measured.caches.values()],
        "largest V error": [cache.v_error for cache in measured.caches.values()],
    }
    for label, errors in rows.items():
        if errors:
            table.add_row(label, "0", f"{max(errors):.2e}")
    return table


def inspection_json(found: Inspection) -> dict[str, object]:
    """Everything `inspect` knows, as JSON."""
    return {
        "method": found.config.method,
        "format_version": found.config.format_version,
        "shards": found.shards,
        "bytes": found.bytes,
        "plan": found.plan.model_dump(mode="json"),
        "measured": found.measured.model_dump(mode="json"),
    }
