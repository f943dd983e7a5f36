"""The report directory: empty or our own, and cleared of nothing but what we wrote."""

from pathlib import Path

from pydantic import ValidationError

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.report import JSON_FILE
from benchmarks.serving.results import Comparison

_RAW = ("prompts-*.json", "*/evaluate.log", "*/server.log", "*/load.log", "*/repeat-*.json")


def prepare(out: Path) -> None:
    """Remove the raw results of an earlier comparison, which would be taken for new ones.

    Raises BenchmarkError for a directory that holds anything and no report of ours.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        Comparison.model_validate_json((out / JSON_FILE).read_bytes())
    except (OSError, ValidationError):
        raise BenchmarkError(
            f"--out {out} is not empty and holds no {JSON_FILE} of this benchmark (one that "
            "failed leaves only raw/).\n"
            "Remedy: give a directory that is empty or does not exist, or remove this one yourself."
        ) from None
    for pattern in _RAW:
        for path in (out / "raw").glob(pattern):
            path.unlink()
