"""Running moments of the inputs of linear layers, in the dense and in the compressed model.

Activations are up-cast and their products summed in fp64. For fp32 activations with one channel of
1e4, fp32 sums cost svd_llm up to 228 times the optimal loss, fp32 products summed in fp64 5 times.
"""

import torch

from offline_compress.calibration.distributed import Workers
from offline_compress.calibration.statistics import SHIFTED, LayerStatistics, Needs
from vllm_svd.errors import SvdError

_BLOCK = 1024  # rows symmetrised at a time: a second copy of the Gram never exists


class ActivationError(SvdError):
    """Activations that are NaN or infinite."""


class InputMoments:
    """Sums over the tokens that one input [n] receives; only those of `needs` are held."""

    def __init__(
        self, features: int, device: torch.device, needs: Needs, paired: bool = True
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.needs, self.paired = needs, paired
        self.tokens = zeros(1)
        self.shifted_tokens = zeros(1)
        self.max_abs = zeros(features)
        self.sums = {"mean_abs": zeros(features)}
        # In the same order in every process, where that of a set is not: workers sum them in turn.
        for name in sorted(needs & {"mean", "shifted_mean"}):
            self.sums[name] = zeros(features)
        for name in sorted(needs & {"gram", "shifted_gram", "shift"}):
            self.sums[name] = zeros(features, features)

    def add(self, x: torch.Tensor, shifted: torch.Tensor | None = None) -> None:
        """Inputs [..., n] of the dense model, and those of the compressed model for the same
        tokens. Without `paired` a router may have sent other tokens to the two: no shift is summed.
        """
        x = x.detach().flatten(0, -2).double()
        size = x.abs()
        self.sums["mean_abs"] += size.sum(0)
        if len(x):
            self.max_abs = torch.maximum(self.max_abs, size.amax(0))
        if "mean" in self.sums:
            self.sums["mean"] += x.sum(0)
        if "gram" in self.sums:
            self.sums["gram"].addmm_(x.T, x)
        self.tokens += len(x)
        if not self.needs & SHIFTED:
            return
        there = x if shifted is None else shifted.detach().flatten(0, -2).double()
        if "shifted_mean" in self.sums:
            self.sums["shifted_mean"] += there.sum(0)
        if "shifted_gram" in self.sums:
            self.sums["shifted_gram"].addmm_(there.T, there)
        if "shift" in self.sums and self.paired:
            self.sums["shift"].addmm_((x - there).T, there)
        self.shifted_tokens += len(there)

    def statistics(self, path: str, workers: Workers) -> LayerStatistics:
        """Moments over all workers, in the memory of the sums, which are spent.

        Raises ActivationError that names the layer whose input is not finite.
        """
        for total in (self.tokens, self.shifted_tokens, *self.sums.values()):
            workers.sum(total)
        workers.largest(self.max_abs)
        if not all(torch.isfinite(total).all() for total in self.sums.values()):
            raise ActivationError(
                f"the input of {path} is NaN or infinite on the calibration text\n"
                "Remedy: check the checkpoint, or run it in a wider dtype (set dtype in its "
                "config.json to bfloat16 or float32)"
            )
        for name, total in self.sums.items():
            count = self.shifted_tokens if name in SHIFTED else self.tokens
            total.div_(count.clamp_min(1))
            if name in ("gram", "shifted_gram"):
                _symmetrise(total)
        if not self.paired and "shifted_mean" in self.sums and "mean" in self.sums:
            # Other tokens than those of the dense model: their difference is no shift of these.
            self.sums["mean"] = self.sums["shifted_mean"]
        found = {name: total for name, total in self.sums.items() if name in self.needs}
        if "max_abs" in self.needs:
            found["max_abs"] = self.max_abs
        return LayerStatistics(tokens=int(self.tokens), **found)


def _symmetrise(matrix: torch.Tensor) -> None:
    """(M + M^T) / 2 in place."""
    for start in range(0, len(matrix), _BLOCK):
        block = slice(start, start + _BLOCK)
        mean = (matrix[block, start:] + matrix[start:, block].T) / 2
        matrix[block, start:] = mean
        matrix[start:, block] = mean.T
