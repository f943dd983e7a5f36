"""Notice tensors that never came: vLLM does not track them once a model is quantised.

Parameters start as NaN and no tensor of a sound checkpoint holds one, whatever loader fills them.
"""

from typing import Any

import torch

from vllm_svd.compat import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from vllm_svd.errors import CheckpointFormatError


def unfilled(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter that check_filled() will complain of unless a loader fills all of it."""
    return torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)


def check_filled(where: str, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Raises CheckpointFormatError that names every parameter with NaN left in it."""
    missing = [name for name, parameter in parameters.items() if parameter.isnan().any()]
    if missing:
        raise CheckpointFormatError(
            where,
            [f"{name} was not loaded completely, or holds NaN" for name in missing],
            "the checkpoint is incomplete; copy it again or compress the model again",
        )


class CheckedLinearMethod(UnquantizedLinearMethod):
    """vLLM's method for a dense layer of a compressed checkpoint."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: Any) -> None:
        check_filled(layer.prefix, {"weight": layer.weight})
        super().process_weights_after_loading(layer)


class CheckedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's method for embeddings and the language-model head."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: Any) -> None:
        check_filled(type(layer).__name__, {"weight": layer.weight})
        super().process_weights_after_loading(layer)
