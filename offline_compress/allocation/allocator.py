"""What an allocator is: a frozen config that splits the byte budget among the matrices."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from offline_compress.progress import Progress, silent

Shares = dict[str, Fraction]

# What must be measured before an allocator can decide.
Asks = Literal["spectra", "influence", "losses", "gates", "menus"]

# Calibration windows on which the loss of a whole model is measured.
LOSS_WINDOWS = 8


@dataclass(frozen=True)
class Matrix:
    """A weight [m, n] in the decoder layer number `layer`; `kind` is the last part of its path.

    `rank_share` is the fraction of the dense bytes that one rank takes, for methods that do not
    store two factors in the model's dtype.
    """

    rows: int
    columns: int
    layer: int
    kind: str
    rank_share: Fraction | None = None

    @property
    def size(self) -> int:
        """Dense parameters."""
        return self.rows * self.columns

    def share_of(self, rank: int) -> Fraction:
        """The fraction of the dense bytes that factors of this rank take."""
        return rank * (self.rank_share or Fraction(self.rows + self.columns, self.size))

    @property
    def largest_rank(self) -> int:
        """The largest rank whose factors are smaller than the matrix."""
        ranks = min(self.rows, self.columns)
        while ranks > 1 and self.share_of(ranks) >= 1:
            ranks = min(ranks - 1, int(1 / self.share_of(1)))
        return ranks


class Offer(NamedTuple):
    """What a matrix may become: its share of the dense bytes, and the loss in nats per token."""

    share: Fraction
    loss: float


class Gated(Protocol):
    """The calibration loss, differentiable in soft truncation positions."""

    def __call__(self, positions: Mapping[str, torch.Tensor], window: int) -> torch.Tensor:
        """Mean nats per token of one calibration window, every matrix in `positions` truncated at
        its scalar position (a rank, real).
        """
        ...


@dataclass(frozen=True)
class Evidence:
    """Everything an allocator may ask for; what it did not ask for is absent.

    `spectra`: what each rank of a matrix adds to its output energy, descending (LowRankMethod
    .spectrum), summed over the calibration tokens. `influence`: 1 - E cos(x_l, x_l+1) of each
    decoder layer. `loss`: mean nats per calibration token with the matrices given at these shares
    and all others dense. `gated`: the same, differentiable, on one of `windows` windows. `menus`:
    what each matrix may become, by the method's own prediction. The plan rounds ranks down to
    multiples of `rank_multiple`.
    """

    matrices: Mapping[str, Matrix]
    spectra: Mapping[str, torch.Tensor] | None = None
    influence: Sequence[float] | None = None
    loss: Callable[[Mapping[str, Fraction]], float] | None = None
    gated: Gated | None = None
    menus: Mapping[str, Sequence[Offer]] | None = None
    windows: int = 0
    rank_multiple: int = 1
    progress: Progress = silent


class Allocator(BaseModel, ABC):
    """A member of the recipe's union: pydantic, frozen, told apart by `name`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""

    paper: ClassVar[str]

    def windows_read(self, matrices: int) -> int:  # noqa: ARG002
        """Windows that it runs through the whole model, at most; a gradient counts as four."""
        return 0

    @property
    @abstractmethod
    def asks(self) -> frozenset[Asks]:
        """The fields of Evidence that `shares` reads, beside the shapes."""

    @abstractmethod
    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        """The fraction of its dense parameters that each matrix keeps, together at most `kept`."""
