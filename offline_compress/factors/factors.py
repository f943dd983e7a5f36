"""What a method makes of one weight: a compressed matrix in one of the artefacts of the format."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.nn import functional

from vllm_svd.format import Module


@dataclass(frozen=True, kw_only=True)
class Factors(ABC):
    """An approximation of W [m, n]; `correction` [m] is added to its output where present."""

    correction: torch.Tensor | None = None

    @abstractmethod
    def config(self) -> Module:
        """The entry of this weight in the checkpoint's config."""

    @abstractmethod
    def parts(self) -> dict[str, torch.Tensor]:
        """Stored tensors by suffix, as `config().parts()` describes them."""

    @classmethod
    @abstractmethod
    def of_parts(cls, config: Any, parts: Mapping[str, torch.Tensor]) -> Self:
        """The inverse of `parts`, without the correction."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The approximation [m, n], in fp64."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., m] of x [..., n], without the layer's own bias."""
        y = self.multiply(x)
        return y if self.correction is None else y + self.correction.to(y)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The product alone; artefacts that need no dense matrix for it say how."""
        return functional.linear(x, self.dense().to(x))

    def to(self, dtype: torch.dtype) -> Self:
        """As it will be stored: parts without a dtype of their own in `dtype`."""
        described = self.config().parts()
        parts = {
            name: part if described[name].dtype else part.to(dtype)
            for name, part in self.parts().items()
        }
        correction = None if self.correction is None else self.correction.to(dtype)
        return self.rebuilt(parts, correction)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """With every stored tensor changed, not in shape or dtype."""
        parts = {name: change(part) for name, part in self.parts().items()}
        return self.rebuilt(parts, None if self.correction is None else change(self.correction))

    def rebuilt(self, parts: Mapping[str, torch.Tensor], correction: torch.Tensor | None) -> Self:
        """The same artefact of other parts."""
        return replace(type(self).of_parts(self.config(), parts), correction=correction)

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of the linear layer at `path`."""
        parts = self.parts()
        if self.correction is not None:
            parts = parts | {"correction": self.correction}
        return {f"{path}.{suffix}": part.contiguous() for suffix, part in parts.items()}

    def output_error(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        """tr(E C E^T) / tr(W C W^T), the relative output error: E = W - W', C the Gram [n, n]."""
        reference, second_moment = weight.double(), gram.double()
        total = _energy(reference, second_moment)
        lost = _energy(reference - self.dense(), second_moment)
        return lost / total if total > 0 else 0.0


def _energy(matrix: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(M C M^T)."""
    return float(torch.dot((matrix @ gram).flatten(), matrix.flatten()))
