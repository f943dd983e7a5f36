"""What the data says about one linear layer."""

from dataclasses import dataclass
from typing import Literal

import torch

# What a method may read of the data. x is the input of the layer in the dense model and x' in the
# model whose earlier layers are compressed already; g is the gradient of the loss with respect to
# the layer's output, per token.
Moment = Literal[
    "mean",
    "mean_abs",
    "max_abs",
    "gram",
    "shifted_mean",
    "shifted_gram",
    "shift",
    "fisher",
    "output_gram",
]
Needs = frozenset[Moment]

GRADIENTS: Needs = frozenset({"fisher", "output_gram"})
SHIFTED: Needs = frozenset({"shifted_mean", "shifted_gram", "shift"})


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one linear layer W [m, n] over `tokens` tokens, in fp64.

    gram: E[x x^T] [n, n]. mean, mean_abs, max_abs: E x, E|x|, max|x| [n]. shifted_mean,
    shifted_gram: E x' and E[x' x'^T]. shift: E[(x - x') x'^T] [n, n]. fisher: the mean over
    samples of the squared gradient of W, summed over its rows, [n]. output_gram: E[g g^T] [m, m].
    Each is None where the method does not need it, so that no method pays for what it does not
    read; layers that read the same input share its tensors.
    """

    gram: torch.Tensor | None = None
    mean_abs: torch.Tensor | None = None
    tokens: int = 0
    mean: torch.Tensor | None = None
    max_abs: torch.Tensor | None = None
    shifted_mean: torch.Tensor | None = None
    shifted_gram: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    output_gram: torch.Tensor | None = None

    def gathered(self, moment: Moment) -> torch.Tensor:
        """The moment; raises LookupError, a bug of the method, if it did not say it needs it."""
        found: torch.Tensor | None = getattr(self, moment)
        if found is None:
            raise LookupError(f"calibration gathered no {moment}: the method must declare `needs`")
        return found
