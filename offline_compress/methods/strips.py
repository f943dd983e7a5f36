"""Strips of rows whose weights are centroids: the linear map from codebooks to weights."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn import functional

from vllm_svd.format import Codebook

_AT_ONCE = 1 << 22  # weights: rows are independent given H, so memory need not grow with them


@dataclass(frozen=True)
class Strips:
    """Weights [s, g, v d] of s strips of g rows: Q = A(codebooks), A linear given the indices.

    codebooks: [s, b, k, d], one for each of the b blocks of `width` vectors, in fp64. indices:
    [s, g, v] of centroids. The columns are those of the matrix, padded to whole vectors.
    """

    codebooks: torch.Tensor
    indices: torch.Tensor
    width: int

    @property
    def cells(self) -> torch.Tensor:
        """The centroid of each vector [s, g, v], counted over all codebooks."""
        strips, blocks, count, _ = self.codebooks.shape
        device = self.indices.device
        block = torch.arange(self.indices.shape[2], device=device) // self.width
        strip = torch.arange(strips, device=device)[:, None, None]
        return (strip * blocks + block) * count + self.indices

    def with_codebooks(self, codebooks: torch.Tensor) -> "Strips":
        return replace(self, codebooks=codebooks)

    def dense(self) -> torch.Tensor:
        """A(codebooks) [s, g, v d]."""
        return self.codebooks.flatten(0, 2)[self.cells].flatten(2)

    def adjoint(self, weights: torch.Tensor) -> torch.Tensor:
        """A^T(weights): the sums [s, b, k, d] over the vectors of each centroid."""
        dim = self.codebooks.shape[3]
        cells = self.cells.flatten()
        sums = [
            torch.bincount(cells, column.flatten(), self.codebooks[..., 0].numel())
            for column in weights.reshape(*self.indices.shape, dim).unbind(3)
        ]
        return torch.stack(sums, dim=1).view_as(self.codebooks)


def energy(errors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T) of each strip [s], of errors [s, g, n] and H [n, n]."""
    return ((errors @ hessian) * errors).sum((1, 2))


def strips_of(weight: torch.Tensor, module: Codebook) -> Iterator[torch.Tensor]:
    """Whole strips [s, g, n] of W [m, n] in fp64, as many as are computed at once.

    Columns are padded to whole vectors; a last strip of fewer rows comes alone.
    """
    columns, rows = module.vectors * module.dim, module.group_rows
    whole = len(weight) // rows * rows
    step = max(1, _AT_ONCE // (rows * columns)) * rows
    for start, stop in pairwise([*range(0, whole, step), whole, len(weight)]):
        if start < stop:
            double = functional.pad(weight[start:stop].double(), (0, columns - module.in_features))
            yield double.reshape(-1, min(rows, stop - start), columns)
