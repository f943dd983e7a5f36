"""PNG plots of a comparison; every panel names the perplexity of what it shows."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.serving.results import Comparison, Measured

matplotlib.use("Agg")

_COLOURS = ("#4c566a", "#2a7f9e", "#c8702a", "#5b8c3e", "#8a5a9e")


def draw(comparison: Comparison, out: Path) -> list[Path]:
    """Write throughput.png, latency.png and kv_cache.png; returns their paths."""
    servers = comparison.servers
    files = [out / "throughput.png", out / "latency.png", out / "kv_cache.png"]
    _save(_throughput(servers), files[0])
    _save(_latency(servers), files[1])
    _save(_capacity(servers), files[2])
    return files


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _names(servers: Sequence[Measured]) -> list[str]:
    return [f"{server.name}\nperplexity {server.quality.perplexity:.1f}" for server in servers]


def _colours(servers: Sequence[Measured]) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(servers))]


def _bars(axes: Axes, servers: Sequence[Measured], values: list[float], title: str) -> None:
    bars = axes.bar(_names(servers), values, color=_colours(servers), width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", label_type="center", color="white", fontsize=11)
    axes.set_title(title, fontsize=11)
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def _throughput(servers: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(2.2 + 1.6 * len(servers), 3.4))
    axes = figure.subplots()
    spreads = [server.spread("output_throughput") for server in servers]
    medians = [spread.median for spread in spreads]
    _bars(axes, servers, medians, "Output tokens per second (bars: range of the repeats)")
    errors = [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
    axes.errorbar(range(len(servers)), medians, yerr=errors, fmt="none", ecolor="black", capsize=4)
    axes.set_ylim(bottom=0)
    return figure


def _latency(servers: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(11, 3.6))
    width = 0.8 / len(servers)
    for axes, metric in zip(figure.subplots(1, 3), ("ttft", "tpot", "itl"), strict=True):
        for index, server in enumerate(servers):
            spreads = [server.spread(f"p{percentile}_{metric}_ms") for percentile in (50, 99)]
            places = [place + (index - (len(servers) - 1) / 2) * width for place in (0, 1)]
            medians = [spread.median for spread in spreads]
            errors = [
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ]
            label = _names([server])[0].replace("\n", ", ")
            axes.bar(places, medians, width, label=label, color=_COLOURS[index % len(_COLOURS)])
            axes.errorbar(places, medians, yerr=errors, fmt="none", ecolor="black", capsize=2)
        axes.set_xticks([0, 1], ["p50", "p99"])
        axes.set_title(f"{metric.upper()}, ms", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(servers), frameon=False)
    figure.subplots_adjust(bottom=0.2)
    return figure


def _capacity(servers: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(2.2 + 1.6 * len(servers), 3.4))
    values = [float(server.cache.size_tokens) for server in servers]
    _bars(figure.subplots(), servers, values, "KV cache in the same bytes, tokens")
    return figure
