"""One pass of the dense model over the calibration windows gives the statistics of its inputs.

Activations are up-cast and their products summed in fp64. For fp32 activations with one channel of
1e4, fp32 sums cost svd_llm up to 228 times the optimal loss, fp32 products summed in fp64 5 times.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_compress.calibration.run import run
from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.progress import Progress, silent
from vllm_svd.errors import SvdError

_BLOCK = 1024  # rows symmetrised at a time: a second copy of the Gram never exists


class ActivationError(SvdError):
    """Activations that are NaN or infinite."""


class _InputMoments:
    """Running sums of one input; without `gram` only those of |x|."""

    def __init__(self, features: int, device: torch.device, gram: bool) -> None:
        self.total_abs = torch.zeros(features, dtype=torch.float64, device=device)
        self.gram = self.total_abs.new_zeros(features, features) if gram else None
        self.tokens = 0

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).double()
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        self.total_abs += x.abs().sum(0)
        self.tokens += len(x)

    def statistics(self) -> LayerStatistics:
        """In the memory of the sums, which are spent."""
        if self.gram is not None:
            _symmetrise(self.gram.div_(self.tokens))
        return LayerStatistics(self.gram, self.total_abs.div_(self.tokens), self.tokens)


def collect(
    model: PreTrainedModel,
    paths: Iterable[str],
    windows: torch.Tensor,
    batch: int,
    needs: Needs,
    progress: Progress = silent,
) -> dict[str, LayerStatistics]:
    """What a method needs of the input of each linear layer, over windows [samples, context].

    Holds one fp64 Gram per path and nothing of that size beside them. Raises ActivationError that
    names the first layer, in the order of `paths`, whose input is not finite.
    """
    paths = dict.fromkeys(paths)
    if needs == "nothing":
        return {path: LayerStatistics() for path in paths}
    moments, hooks = {}, []
    for path in paths:
        linear = model.get_submodule(path)
        moments[path] = _InputMoments(linear.in_features, linear.weight.device, needs == "gram")
        hooks.append(linear.register_forward_pre_hook(moments[path]))
    run(model, windows, batch, hooks, progress, "calibration")
    for path, moment in moments.items():
        # |x| of every channel is in this sum: where it is finite, so is the Gram.
        if not torch.isfinite(moment.total_abs).all():
            raise ActivationError(
                f"the input of {path} is NaN or infinite on the calibration text\n"
                "Remedy: check the checkpoint, or run it in a wider dtype (set dtype in its "
                "config.json to bfloat16 or float32)"
            )
    return {path: moment.statistics() for path, moment in moments.items()}


def _symmetrise(matrix: torch.Tensor) -> None:
    """(M + M^T) / 2 in place."""
    for start in range(0, len(matrix), _BLOCK):
        block = slice(start, start + _BLOCK)
        mean = (matrix[block, start:] + matrix[start:, block].T) / 2
        matrix[block, start:] = mean
        matrix[start:, block] = mean.T
