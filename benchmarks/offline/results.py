"""All points of one model, kept on disk one by one, and the tables and plots made of them."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from benchmarks.machine import Machine
from benchmarks.offline.compare import Agreement
from benchmarks.offline.points import Point


class Quality(BaseModel):
    """The dense model, every point, and what they were measured with.

    `dense` has the perplexity per text, `dense_tasks` its tasks; `scored_tokens` are those of each
    text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    parameters: int
    checkpoint_bytes: int
    calibration: str
    calibration_tokens: int
    context: int
    scored_tokens: dict[str, int]
    dense: dict[str, Agreement]
    dense_tasks: dict[str, float] = {}
    points: tuple[Point, ...]
    machine: Machine

    def table(self) -> Table:
        """One row a point, in the order they were asked for."""
        table = Table(title=f"{self.model}: {self.checkpoint_bytes:,} bytes dense")
        table.add_column("method")
        for column in (
            "kept",
            "bytes",
            "KV bytes",
            *self._columns(),
            "error",
            "predicted",
            "s",
            "MiB",
        ):
            table.add_column(column, justify="right")
        table.add_row(
            "dense",
            "1",
            f"{self.checkpoint_bytes:,}",
            "",
            *self._cells(self.dense, self.dense_tasks),
            "0",
            "0",
            "",
            "",
            end_section=True,
        )
        for point in self.points:
            table.add_row(
                point.method,
                f"{point.kept:g}",
                f"{point.checkpoint_bytes:,}",
                f"{point.kv_bytes_per_token:,}",
                *self._cells(point.texts, point.tasks),
                _error(point.held_out),
                _error(point.predicted),
                f"{point.seconds:.0f}",
                f"{point.peak_bytes / 2**20:.0f}",
            )
        return table

    def markdown(self) -> str:
        """The same table, in Markdown."""
        kv = "KV bytes per token"
        head = [
            "method",
            "kept",
            "checkpoint bytes",
            kv,
            *self._columns(),
            "output error",
            "seconds",
        ]
        scores = self._cells(self.dense, self.dense_tasks)
        rows = [["dense", "1", f"{self.checkpoint_bytes:,}", "", *scores, "0", ""]]
        rows += [
            [
                point.method,
                f"{point.kept:g}",
                f"{point.checkpoint_bytes:,}",
                f"{point.kv_bytes_per_token:,}",
                *self._cells(point.texts, point.tasks),
                _error(point.held_out),
                f"{point.seconds:.0f}",
            ]
            for point in self.points
        ]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def _columns(self) -> Iterator[str]:
        for name in self.scored_tokens:
            yield from (f"ppl {name}", f"KL {name}", f"top-1 {name}")
        yield from self.dense_tasks

    def _cells(self, texts: dict[str, Agreement], tasks: dict[str, float]) -> list[str]:
        cells: list[str] = []
        for name in self.scored_tokens:
            found = texts[name]
            cells += [f"{found.perplexity:.3f}", f"{found.kl:.2e}", f"{found.top1:.3f}"]
        return cells + [f"{tasks[name]:.3f}" for name in self.dense_tasks]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


class Archive:
    """Points in a directory, so that a laboratory that was stopped goes on where it was."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> Point | None:
        """A point measured before with the same recipe, or None."""
        path = self.directory / f"{key}.json"
        return Point.model_validate_json(path.read_text()) if path.is_file() else None

    def save(self, key: str, point: Point) -> None:
        write(self.directory / f"{key}.json", point.model_dump_json(indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """A file that appears complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
