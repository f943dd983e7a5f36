"""What the data says about the input of a linear layer."""

from dataclasses import dataclass
from typing import Literal

import torch

# What a method reads of the data, each level with those before it.
Needs = Literal["nothing", "mean_abs", "gram"]


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of the input x [n] of one linear layer over `tokens` tokens, in fp64.

    `gram` is E[x x^T] [n, n] and `mean_abs` E|x| [n]; each is None where the method does not need
    it, so that no method pays for what it does not read.
    """

    gram: torch.Tensor | None = None
    mean_abs: torch.Tensor | None = None
    tokens: int = 0

    def gathered(self, moment: Literal["mean_abs", "gram"]) -> torch.Tensor:
        """The moment; raises LookupError, a bug of the method, if it did not say it needs it."""
        found = self.gram if moment == "gram" else self.mean_abs
        if found is None:
            raise LookupError(f"calibration gathered no {moment}: the method must declare `needs`")
        return found
