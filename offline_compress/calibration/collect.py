"""One pass of the dense model over the calibration windows gives the statistics of every input."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.progress import Progress, silent
from vllm_svd.errors import SvdError


class ActivationError(SvdError):
    """Activations that are NaN or infinite."""


class _Moments:
    """Running sums of one input, in fp32 of the up-cast activations."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.gram = torch.zeros(features, features, device=device)
        self.total_abs = torch.zeros(features, device=device)
        self.tokens = 0

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        self.gram.addmm_(x.T, x)
        self.total_abs += x.abs().sum(0)
        self.tokens += len(x)

    def statistics(self) -> LayerStatistics:
        gram = self.gram / self.tokens
        return LayerStatistics((gram + gram.T) / 2, self.total_abs / self.tokens, self.tokens)


def collect(
    model: PreTrainedModel,
    paths: Iterable[str],
    windows: torch.Tensor,
    batch: int,
    progress: Progress = silent,
) -> dict[str, LayerStatistics]:
    """Statistics of the input of each linear layer in `paths`, over windows [samples, context].

    Raises ActivationError that names the first layer, in the order of `paths`, whose input is
    not finite.
    """
    moments, hooks = {}, []
    for path in dict.fromkeys(paths):
        linear = model.get_submodule(path)
        moments[path] = _Moments(linear.in_features, linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(moments[path]))
    try:
        run(model, windows, batch, progress, "calibration")
    finally:
        for hook in hooks:
            hook.remove()
    statistics = {path: moment.statistics() for path, moment in moments.items()}
    for path, found in statistics.items():
        if not (torch.isfinite(found.gram).all() and torch.isfinite(found.mean_abs).all()):
            raise ActivationError(
                f"the input of {path} is NaN or infinite on the calibration text\n"
                "Remedy: check the checkpoint, or run it in a wider dtype (set dtype in its "
                "config.json to bfloat16 or float32)"
            )
    return statistics


@torch.inference_mode()
def run(
    model: PreTrainedModel, windows: torch.Tensor, batch: int, progress: Progress, stage: str
) -> None:
    """The decoder over every window, `batch` at a time, for the sake of the hooks on it."""
    progress(stage, 0, len(windows))
    for start in range(0, len(windows), batch):
        inputs = windows[start : start + batch].to(model.device)
        model.base_model(input_ids=inputs, use_cache=False)
        progress(stage, min(start + batch, len(windows)), len(windows))
