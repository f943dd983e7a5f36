"""report.json: everything that was measured, for whom, on what and with which versions."""

import statistics
import sys
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from benchmarks.machine import Machine
from benchmarks.serving.load import Round
from benchmarks.serving.metrics import CacheConfig, Counters
from benchmarks.serving.protocol import Protocol


class Quality(BaseModel):
    """Perplexity as `offline-compress evaluate --json` prints it."""

    model_config = ConfigDict(frozen=True)

    perplexity: float
    tokens: int
    windows: int
    context: int


class Spread(BaseModel):
    """Median and range over the repeats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    low: float
    high: float


class Measured(BaseModel):
    """One server: its checkpoint, its quality, its KV cache and its repeats.

    `background` is the fraction of the CPU that was busy before the load, with the server idle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    directory: str
    checkpoint_bytes: int
    stored_kv_bytes_per_token: int
    quality: Quality
    start_seconds: float
    background: float
    cache: CacheConfig
    counters: Counters
    rounds: tuple[Round, ...]

    def spread(self, field: str) -> Spread:
        """Median and range of a field of `Round`."""
        values = [float(getattr(result, field)) for result in self.rounds]
        return Spread(median=statistics.median(values), low=min(values), high=max(values))


class Comparison(BaseModel):
    """The dense server first, then every compressed one, in the order they ran."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    command: str
    text: str
    protocol: Protocol
    machine: Machine
    servers: tuple[Measured, ...]


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def command_line(module: str = "benchmarks.serving") -> str:
    """The command that was given."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])
