"""Engines as processes that take turns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.server import relevant

_WORKER = Path(__file__).with_name("worker.py")


class Engine:
    """An engine that waits for its turn, at no cost to the others."""

    def __init__(self, model: Path, arguments: dict[str, Any], log: Path) -> None:
        self.model = model
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(_WORKER), str(model), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
            )

    def answer(self) -> dict[str, Any]:
        """The next answer; raises BenchmarkError where the process has ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            shown = "\n".join(f"  {row}" for row in relevant(self._log.read_text()))
            raise BenchmarkError(
                f"the engine of {self.model} exited with {self._process.wait()}:\n{shown}\n"
                f"The whole log: {self._log}"
            )
        return dict(json.loads(line))

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds per step of a batch of `prompts`, all steps but the first."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer then says why
            self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        return float(self.answer()["seconds"]) / (tokens - 1)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def started(
    models: dict[str, Path], arguments: dict[str, Any], logs: Path
) -> Iterator[dict[str, Engine]]:
    """All engines, started one after the other and stopped together."""
    with ExitStack() as stack:
        engines = {}
        for name, model in models.items():
            engines[name] = engine = Engine(model, arguments, logs / f"{name}.log")
            stack.callback(engine.stop)
            engine.answer()
        yield engines
