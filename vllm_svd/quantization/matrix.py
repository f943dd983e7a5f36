"""One checkpoint matrix in a linear layer: what of it this tensor-parallel rank holds, and W x."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_svd.format import Stored
from vllm_svd.kernels.products import linear

Parts = Mapping[str, torch.Tensor]


class Matrix(ABC):
    """W [m, n] in one artefact, of which this rank serves the `rows` and the `columns`.

    A part is a tensor by the suffix of its name in the checkpoint. `where` names the matrix in
    errors.
    """

    def __init__(self, module: Any, rows: slice, columns: slice, where: str) -> None:
        self.module = module
        self.rows, self.columns = rows, columns
        self.where = where

    @abstractmethod
    def local(self) -> dict[str, tuple[slice, ...]]:
        """What this rank keeps of each part, one slice a dimension."""

    @abstractmethod
    def multiply(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x [..., columns] to [..., rows], from this rank's parts and in the dtype of x."""

    def problems(self, parts: Parts) -> list[str]:  # noqa: ARG002
        """What is wrong with parts whose shapes and dtypes are right."""
        return []

    def stored(self) -> dict[str, Stored]:
        """Every part as the checkpoint stores it, the correction included."""
        parts: dict[str, Stored] = self.module.parts()
        if self.module.correction:
            parts["correction"] = Stored((self.module.out_features,))
        return parts

    def indices(self) -> dict[str, tuple[slice, ...]]:
        """`local` and the correction, which goes with the rows."""
        return self.local() | ({"correction": (self.rows,)} if self.module.correction else {})

    @property
    def corrects(self) -> bool:
        """Whether this rank adds the correction: once where ranks share out the columns."""
        return bool(self.module.correction) and self.columns.start == 0


@dataclass(frozen=True)
class Dense:
    """The description of a matrix [m, n] that was not compressed."""

    out_features: int
    in_features: int
    correction: bool = False

    def parts(self) -> dict[str, Stored]:
        return {"weight": Stored((self.out_features, self.in_features))}


class DenseMatrix(Matrix):
    """An uncompressed shard of a fused layer whose others are compressed."""

    def local(self) -> dict[str, tuple[slice, ...]]:
        return {"weight": (self.rows, self.columns)}

    def multiply(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        return linear(x, parts["weight"])


def whole(size: int) -> slice:
    """All of a dimension."""
    return slice(0, size)


def length(part: slice) -> int:
    """Elements of a slice with both ends."""
    return int(part.stop - part.start)
