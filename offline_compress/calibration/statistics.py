"""What the data says about the input of a linear layer."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of the input x [n] of one linear layer over `tokens` tokens.

    `gram` is E[x x^T] [n, n] and `mean_abs` is E|x| [n].
    """

    gram: torch.Tensor
    mean_abs: torch.Tensor
    tokens: int
