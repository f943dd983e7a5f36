"""One pass of a model over token windows, for the sake of the hooks on it."""

from collections.abc import Iterable

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from offline_compress.progress import Progress
from vllm_svd.errors import SvdError


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch: int,
    hooks: Iterable[RemovableHandle],
    progress: Progress,
    stage: str,
) -> None:
    """The decoder over windows [samples, context], `batch` at a time; the hooks are then removed.

    Raises SvdError for windows without a token.
    """
    try:
        if windows.ndim != 2 or windows.numel() == 0 or batch < 1:
            raise SvdError(
                f"calibration windows of shape {list(windows.shape)} with batch {batch} hold no "
                "tokens\nRemedy: give token ids [samples, context] and a batch of at least 1"
            )
        progress(stage, 0, len(windows))
        for start in range(0, len(windows), batch):
            inputs = windows[start : start + batch].to(model.device)
            model.base_model(input_ids=inputs, use_cache=False)
            progress(stage, start + len(inputs), len(windows))
    finally:
        for hook in hooks:
            hook.remove()
