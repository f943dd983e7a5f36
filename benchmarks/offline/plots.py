"""Perplexity against the bytes of the whole checkpoint, one line a method."""

from pathlib import Path

import matplotlib

from benchmarks.offline.results import Quality

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(found: Quality, directory: Path) -> list[Path]:
    """One PNG a text; the axis of perplexity is logarithmic."""
    made = []
    for text in found.scored_tokens:
        figure, axes = pyplot.subplots(figsize=(8, 5.5), constrained_layout=True)
        for number, method in enumerate(dict.fromkeys(point.method for point in found.points)):
            points = sorted(
                (point.checkpoint_bytes / 2**20, point.texts[text].perplexity)
                for point in found.points
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
