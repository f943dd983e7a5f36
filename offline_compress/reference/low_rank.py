"""A linear layer kept as its two factors."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from offline_compress.methods.factors import LowRankFactors
from vllm_svd.errors import SvdError


class LowRankLinear(nn.Module):
    """y = B (A x) + bias with A [r, n] and B [m, r]."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None) -> None:  # noqa: N803
        super().__init__()
        self.A = nn.Parameter(A.contiguous(), requires_grad=False)
        self.B = nn.Parameter(B.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """B A [m, n], what this layer multiplies by."""
        return self.B @ self.A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.A), self.B, self.bias)


def install_factors(model: PreTrainedModel, path: str, factors: LowRankFactors) -> None:
    """Replace the linear layer at `path` by `factors`, in the layer's dtype, keeping its bias.

    Raises SvdError if there is no dense linear layer of that shape, or if hooks of install_kv
    already watch it (they would be lost).
    """
    linear = model.get_submodule(path)
    shape = [factors.B.shape[0], factors.A.shape[1]]
    if not isinstance(linear, nn.Linear) or list(linear.weight.shape) != shape:
        found = (
            list(linear.weight.shape) if isinstance(linear, nn.Linear) else type(linear).__name__
        )
        raise SvdError(
            f"{path}: factors of a {shape} matrix do not fit {found}\n"
            "Remedy: install the factors of this very matrix, once, on the dense model"
        )
    parent, _, name = path.rpartition(".")
    if hasattr(model.get_submodule(parent), "attn"):
        raise SvdError(
            f"{path}: its attention layer already carries K/V projections\n"
            "Remedy: install weight factors before K/V projections"
        )
    like = linear.weight
    A, B = (factor.to(like) for factor in (factors.A, factors.B))  # noqa: N806
    setattr(model.get_submodule(parent), name, LowRankLinear(A, B, linear.bias))
