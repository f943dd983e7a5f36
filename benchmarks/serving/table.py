"""The rows of the report: a label, a unit, a figure per server and its ratio to dense."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from benchmarks.serving.results import Comparison, Measured, Spread

Figure = float | Spread
# Above this fraction of a busy CPU before the load, speeds are not comparable.
NOISY = 0.15


@dataclass(frozen=True)
class Row:
    """One quantity; `better` is the direction in which it improves."""

    label: str
    better: str
    figure: Callable[[Measured], Figure]
    digits: int = 0

    def cell(self, server: Measured, dense: Measured) -> str:
        """The figure with its range, and the ratio where there is something to compare."""
        value, base = self.figure(server), median(self.figure(dense))
        shown = f"{median(value):,.{self.digits}f}"
        if isinstance(value, Spread):
            shown += f" [{value.low:,.{self.digits}f}..{value.high:,.{self.digits}f}]"
        if server is dense or not base:
            return shown
        return f"{shown} ({median(value) / base:.2f}x)"


def median(figure: Figure) -> float:
    """The figure itself, or the median of its repeats."""
    return figure.median if isinstance(figure, Spread) else figure


def _spread(field: str) -> Callable[[Measured], Figure]:
    return lambda server: server.spread(field)


ROWS = (
    Row("perplexity", "lower", lambda server: server.quality.perplexity, 2),
    Row("checkpoint, bytes", "lower", lambda server: server.checkpoint_bytes),
    Row("KV bytes per token", "lower", lambda server: server.stored_kv_bytes_per_token),
    Row("KV cache in the same bytes, tokens", "higher", lambda server: server.cache.size_tokens),
    Row("output, tokens/s", "higher", _spread("output_throughput")),
    Row("TTFT p50, ms", "lower", _spread("p50_ttft_ms")),
    Row("TTFT p99, ms", "lower", _spread("p99_ttft_ms")),
    Row("TPOT p50, ms", "lower", _spread("p50_tpot_ms"), 1),
    Row("TPOT p99, ms", "lower", _spread("p99_tpot_ms"), 1),
    Row("ITL p50, ms", "lower", _spread("p50_itl_ms"), 1),
    Row("ITL p99, ms", "lower", _spread("p99_itl_ms"), 1),
    Row("preemptions", "lower", lambda server: server.counters.preemptions),
)


def terminal(comparison: Comparison) -> Table:
    """The table as rich prints it."""
    dense = comparison.servers[0]
    table = Table(title=escape(caption(comparison)), caption=escape(warning(comparison)))
    table.add_column("")
    table.add_column("better")
    for server in comparison.servers:
        table.add_column(server.name, justify="right")
    for row in ROWS:
        cells = [escape(row.cell(server, dense)) for server in comparison.servers]
        table.add_row(row.label, row.better, *cells)
    return table


def warning(comparison: Comparison) -> str:
    """Names the servers that shared the CPU with other work; empty if none did."""
    noisy = [
        f"{server.name} ({server.background:.0%})"
        for server in comparison.servers
        if server.background > NOISY
    ]
    if not noisy:
        return ""
    return (
        "The CPU was busy with other work before the load of "
        f"{', '.join(noisy)}: do not compare speeds; repeat on an idle machine."
    )


def caption(comparison: Comparison) -> str:
    """What was sent, in one sentence."""
    load = comparison.protocol
    return (
        f"{load.repeats} repeats of {load.requests} requests, {load.input_len} tokens in and "
        f"{load.output_len} out, {load.concurrency} at a time, {load.kv_bytes:,} bytes of KV "
        "cache: median [lowest..highest] (ratio to dense)"
    )
