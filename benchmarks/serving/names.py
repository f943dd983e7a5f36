"""Checkpoints that were given as NAME=DIR."""

from pathlib import Path

from benchmarks.serving.errors import BenchmarkError


def named(given: list[str]) -> dict[str, Path]:
    """Directories by their names; raises BenchmarkError where one is not accepted."""
    found: dict[str, Path] = {}
    for item in given:
        name, equals, directory = item.partition("=")
        if not equals or not name.isidentifier() or name in {"dense", *found}:
            raise BenchmarkError(
                f"--compressed {item} is not accepted: NAME=DIR with a NAME of letters, digits "
                "and _, each name once and none of them dense."
            )
        found[name] = Path(directory)
    return found
