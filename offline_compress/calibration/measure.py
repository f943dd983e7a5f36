"""What factors lose on text that they were not computed from."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from offline_compress.calibration.run import run
from offline_compress.progress import Progress, silent


class _Loss:
    """Running sums of ||(W - B A) x||^2 and ||W x||^2, in fp32 of the up-cast operands."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b = a, b
        self.lost = self.total = 0.0

    def __call__(self, module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        exact = linear(x, module.weight.float())
        rebuilt = linear(linear(x, self.a.float()), self.b.float())
        self.lost += float((exact - rebuilt).double().square().sum())
        self.total += float(exact.double().square().sum())


def output_errors(
    model: PreTrainedModel,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    windows: torch.Tensor,
    batch: int,
    progress: Progress = silent,
) -> dict[str, float]:
    """Relative output error of (A [r, n], B [m, r]) per path, on the dense model's own inputs.

    The error is the sum of ||(W - B A) x||^2 over that of ||W x||^2, bias left out.
    """
    losses = {path: _Loss(*pair) for path, pair in factors.items()}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(loss) for path, loss in losses.items()
    ]
    run(model, windows, batch, hooks, progress, "held-out error")
    return {path: loss.lost / loss.total if loss.total else 0.0 for path, loss in losses.items()}
