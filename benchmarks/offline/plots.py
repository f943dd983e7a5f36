"""Perplexity against the bytes of the checkpoint and of the K/V cache, one line a method."""

from pathlib import Path

import matplotlib

from benchmarks.offline.points import Point
from benchmarks.offline.results import Quality

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

# Names of points that leave the weights dense.
CACHES = ("kv ", "quantised ")


def plot(found: Quality, directory: Path) -> list[Path]:
    """One PNG a text for weights, one for caches; the axis of perplexity is logarithmic."""
    caches = [point for point in found.points if point.method.startswith(CACHES)]
    weights = [point for point in found.points if not point.method.startswith(CACHES)]
    return _weights(found, weights, directory) + _caches(found, caches, directory)


def _weights(found: Quality, every: list[Point], directory: Path) -> list[Path]:
    made: list[Path] = []
    for text in found.scored_tokens if every else ():
        figure, axes = pyplot.subplots(figsize=(8, 5.5), constrained_layout=True)
        for number, method in enumerate(dict.fromkeys(point.method for point in every)):
            points = sorted(
                (point.checkpoint_bytes / 2**20, point.texts[text].perplexity)
                for point in every
                if point.method == method
            )
            style = "-" if number < 10 else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=method)
        axes.axhline(found.dense[text].perplexity, color="black", linewidth=0.8, label="dense")
        axes.set_yscale("log")
        axes.set_xlabel("checkpoint, MiB")
        axes.set_ylabel(f"perplexity on {text}")
        axes.set_title(found.model)
        axes.legend(fontsize=7, ncols=2)
        named = "-".join(Path(text).with_suffix("").parts)
        path = directory / f"{found.model}-{named}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        made.append(path)
    return made


def _caches(found: Quality, every: list[Point], directory: Path) -> list[Path]:
    """Change of perplexity, and KL, against the bytes that the cache holds of a token."""
    lines: dict[str, list[Point]] = {}
    for point in sorted(every, key=lambda point: point.kv_bytes_per_token):
        name = "dense cache, quantised" if point.method.startswith("quantised") else point.method
        lines.setdefault(name, []).append(point)
    made: list[Path] = []
    for text in found.scored_tokens if every else ():
        figure, (change, kl) = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
        dense = found.dense[text].perplexity
        for name, points in lines.items():
            sizes = [point.kv_bytes_per_token for point in points]
            scores = [point.texts[text] for point in points]
            style = {"marker": "o", "markersize": 3, "label": name}
            changes = [100 * (score.perplexity / dense - 1) for score in scores]
            change.plot(sizes, changes, **style)
            kl.plot(sizes, [score.kl for score in scores], **style)
        change.axhline(0, color="black", linewidth=0.8)
        change.set_yscale("symlog", linthresh=0.1)
        change.set_ylabel(f"change of perplexity on {text}, %")
        kl.set_yscale("log")
        kl.set_ylabel("KL(dense || compressed), nats per token")
        for axes in (change, kl):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
            axes.set_xlabel("KV bytes per token")
        kl.legend(fontsize=7)
        figure.suptitle(found.model)
        named = "-".join(Path(text).with_suffix("").parts)
        path = directory / f"{found.model}-kv-{named}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        made.append(path)
    return made
