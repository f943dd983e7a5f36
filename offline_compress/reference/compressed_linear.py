"""A linear layer kept as its compressed artefact."""

from collections.abc import Mapping

import torch
from torch import nn

from offline_compress.factors import DeltaFactors, Factors, of_parts
from vllm_svd.errors import SvdError
from vllm_svd.format import Module


class CompressedLinear(nn.Module):
    """y = W' x + bias, with the parts of W' as parameters named like in the checkpoint."""

    def __init__(
        self, config: Module, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.config = config
        self._names = tuple(parts)
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part.contiguous(), requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.config.in_features

    @property
    def out_features(self) -> int:
        return self.config.out_features

    def factors(self) -> Factors:
        """The artefact, over the parameters of this layer."""
        return of_parts(self.config, {name: getattr(self, name) for name in self._names})

    @property
    def weight(self) -> torch.Tensor:
        """W' [m, n], what this layer multiplies by."""
        like = next(self.parameters())
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return self.factors().dense().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.factors().apply(x)
        return y if self.bias is None else y + self.bias


def install_factors(root: nn.Module, path: str, factors: Factors) -> None:
    """Replace the linear layer at `path` of a model or a block by `factors`, keeping its bias.

    Parts without a dtype of their own take the layer's. Raises SvdError if there is no dense
    linear layer of that shape, or if hooks of install_kv already watch it (they would be lost).
    """
    linear = root.get_submodule(path)
    config = factors.config()
    shape = [config.out_features, config.in_features]
    if not isinstance(linear, nn.Linear) or list(linear.weight.shape) != shape:
        found = (
            list(linear.weight.shape) if isinstance(linear, nn.Linear) else type(linear).__name__
        )
        raise SvdError(
            f"{path}: factors of a {shape} matrix do not fit {found}\n"
            "Remedy: install the factors of this very matrix, once, on the dense model"
        )
    parent, _, name = path.rpartition(".")
    if hasattr(root.get_submodule(parent), "attn"):
        raise SvdError(
            f"{path}: its attention layer already carries K/V projections\n"
            "Remedy: install weight factors before K/V projections"
        )
    like = linear.weight
    if isinstance(factors, DeltaFactors):  # multiplied as what it makes of its base
        linear.weight = nn.Parameter(factors.dense().to(like), requires_grad=False)
        return
    parts = {
        key.removeprefix("."): part.to(like.device)
        for key, part in factors.to(like.dtype).tensors("").items()
    }
    setattr(root.get_submodule(parent), name, CompressedLinear(config, parts, linear.bias))


def install_skeleton(root: nn.Module, path: str, config: Module, dtype: torch.dtype) -> None:
    """Replace the linear layer at `path` by an empty artefact on the meta device."""
    linear = root.get_submodule(path)
    parent, _, name = path.rpartition(".")
    parts = {
        key.removeprefix("."): torch.empty(
            stored.shape, dtype=_TORCH.get(stored.dtype or "", dtype), device="meta"
        )
        for key, stored in config.tensors("").items()
    }
    bias = linear.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    setattr(root.get_submodule(parent), name, CompressedLinear(config, parts, bias))


_TORCH = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F32": torch.float32}
