"""One compressed model: made by `offline-compress run` in a process of its own, then scored."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.offline.compare import Agreement, Scored
from benchmarks.offline.tasks import Tasks
from offline_compress import reference
from offline_compress.calibration import Corpus
from offline_compress.checkpoint import inspect
from offline_compress.evaluation import perplexity
from offline_compress.progress import Progress
from vllm_svd.errors import SvdError

# The peak of a process starts over at exec; what wait4 tells of a child includes its parent's.
_RUN = """
import atexit, sys
from pathlib import Path
from offline_compress.cli import main

target = Path(sys.argv.pop())

@atexit.register
def report():
    rows = Path("/proc/self/status").read_text().splitlines()
    target.write_text(next(row for row in rows if row.startswith("VmHWM")).split()[1])

main()
"""


class Point(BaseModel):
    """A method at a budget.

    `kept` is the share of the linear layers' bytes that was asked for, `checkpoint_bytes` what the
    tensors of the whole checkpoint take. `predicted` and `held_out` are the mean relative output
    error of the matrices: in the method's own metric, and on text that nothing was computed from.
    `perplexity_run` is what the run measured on its own held-out windows, `perplexity_reloaded`
    the same tokens scored after loading the checkpoint. Seconds and peak resident bytes are of the
    whole run, imports included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    kept: float
    checkpoint_bytes: int
    linear_bytes: int
    kv_bytes_per_token: int
    predicted: float | None
    held_out: float | None
    perplexity_run: float
    perplexity_reloaded: float
    texts: dict[str, Agreement]
    tasks: dict[str, float] = {}
    seconds: float
    peak_bytes: int


def recipe_of(weights: Mapping[str, Any], kept: float, **calibration: Any) -> dict[str, Any]:
    """A recipe that compresses the weights alone."""
    return {
        "weights": {**weights, "kept": kept},
        "kv": {"kept": None},
        "calibration": calibration,
    }


def measure(
    name: str,
    kept: float,
    recipe: Mapping[str, Any],
    model: Path,
    dense: PreTrainedModel,
    texts: Iterable[Scored],
    tasks: Tasks,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    batch: int,
    progress: Progress,
    base: Path | None = None,
    exact: int = 0,
) -> Point:
    """Compress `model`, verify and reload what was written, and score it on every text.

    There the first `exact` positions of each window pass K/V projections as they are.
    Raises SvdError with the last line that the run said if it failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        out, written = Path(directory) / "out", Path(directory) / "recipe.yaml"
        written.write_text(yaml.safe_dump(dict(recipe)))
        peak, log = Path(directory) / "peak", Path(directory) / "log"
        arguments = ["run", str(model), str(out), "--recipe", str(written), str(peak)]
        started = time.monotonic()
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, "-c", _RUN, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        seconds = time.monotonic() - started
        if done.returncode:
            raise SvdError(f"{name} at {kept:g} kept failed: {log.read_text().strip()[-2000:]}")
        found = inspect(out)
        compressed = reference.load(out, dense.device, dense.dtype, base)
        measured, totals = found.measured, found.plan.totals
        reloaded = perplexity(
            compressed, corpus.held_out, corpus.calibration.shape[1], batch, corpus.bos
        ).perplexity
        reference.hold_exactly(compressed, exact)
        errors = list(measured.matrices.values())
        unseen = [error.held_out for error in errors if error.held_out is not None]
        return Point(
            method=name,
            kept=kept,
            checkpoint_bytes=totals.checkpoint_bytes,
            linear_bytes=totals.linear_bytes,
            kv_bytes_per_token=totals.kv_bytes_per_token,
            predicted=mean(error.predicted for error in errors) if errors else None,
            held_out=mean(unseen) if unseen else None,
            perplexity_run=measured.perplexity,
            perplexity_reloaded=reloaded,
            texts={text.name: text.compare(dense, compressed, batch, progress) for text in texts},
            tasks=tasks.scores(compressed, tokenizer, batch),
            seconds=seconds,
            peak_bytes=int(peak.read_text()) * 1024,
        )
