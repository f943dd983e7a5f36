"""Notice tensors that never came: vLLM does not track them once a model is quantised.

Parameters start as NaN, integers as their lowest value, whatever loader fills them. No tensor of a
sound checkpoint holds a NaN, and none holds the lowest integer throughout: 8-bit steps are
symmetric, indices are not negative, and every word of a bit stream would have to be its top bit.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_svd.compat import UnquantizedEmbeddingMethod, UnquantizedLinearMethod, set_weight_attrs
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.kernels.products import emulated, linear


def unfilled(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter that check_filled() will complain of unless a loader fills all of it."""
    if dtype.is_floating_point:
        return torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)
    lowest = torch.full(shape, torch.iinfo(dtype).min, dtype=dtype)
    parameter = torch.nn.Parameter(lowest, requires_grad=False)
    # vLLM's dummy loader makes random floats but leaves integers, unless it is told a value.
    set_weight_attrs(parameter, {"dummy_weight_value": 0})
    return parameter


def check_filled(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointFormatError that names every tensor that is as unfilled() made it.

    A float is named for any NaN, an integer for having nothing else than the lowest value.
    """
    missing = [name for name, tensor in tensors.items() if _unfilled(tensor)]
    if missing:
        raise CheckpointFormatError(
            where,
            [f"{name} was not loaded completely, or holds NaN" for name in missing],
            "the checkpoint is incomplete; copy it again or compress the model again",
        )


def _unfilled(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return tensor.numel() > 0 and bool((tensor == torch.iinfo(tensor.dtype).min).all())


class CheckedLinearMethod(UnquantizedLinearMethod):
    """vLLM's method for a dense layer of a compressed checkpoint."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: Any) -> None:
        check_filled(layer.prefix, {"weight": layer.weight})
        super().process_weights_after_loading(layer)
        _multiply_fast(layer)


class CheckedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's method for embeddings and the language-model head."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: Any) -> None:
        check_filled(type(layer).__name__, {"weight": layer.weight})
        super().process_weights_after_loading(layer)
        _multiply_fast(layer)


def _multiply_fast(layer: Any) -> None:
    """Where vLLM fell back to torch's own product, which the CPU would emulate, take ours."""
    if layer.weight.numel() and emulated(layer.weight):
        layer.cpu_linear = linear
