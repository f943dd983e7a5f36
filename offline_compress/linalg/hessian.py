"""The upper Cholesky factor of a damped Gram, which stands in for the inverse Hessian of GPTQ.

H = R R^T, R upper triangular [n, n], so U = R^-1 is the factor H^-1 = U^T U of the papers. Of a
block P of columns and those before it, ||E R||^2 only needs R: with the errors E of earlier columns
made, and later ones free to correct, the error of P costs ||E_before R_before,P + E_P R_PP||^2.
Chen et al., "GPTQ as Babai's Nearest Plane Algorithm", arXiv 2507.18553, read GPTQ so.
"""

from typing import NamedTuple

import torch

from offline_compress.linalg.cholesky import cholesky
from offline_compress.linalg.symmetric import symmetrised

_COLUMNS = 1024


class Hessian(NamedTuple):
    """H = C + damping * mean(diag C) * I [n, n] and R [n, n], upper, with R R^T = H, in fp64.

    precisions: 1 / [H^-1]_jj [n], what an error of column j costs when all others make up for it.
    """

    matrix: torch.Tensor
    factor: torch.Tensor
    precisions: torch.Tensor
    damping: float


def damped_hessian(gram: torch.Tensor, damping: float) -> Hessian:
    """Damp a Gram [n, n] by a fraction of its mean diagonal, and by more only if that is singular.

    A Gram of zeros, of inputs that were never seen, says nothing: the identity takes its place.
    """
    matrix = symmetrised(gram)
    mean = matrix.diagonal().mean()
    if not mean > 0:
        matrix, mean = torch.eye(len(matrix)).to(matrix), torch.ones_like(mean)
    matrix.diagonal().add_(damping * mean)
    # Factored from the last column to the first, so that R is upper and not lower triangular.
    lower, more = cholesky(matrix.flip(0, 1))
    further = more * (1 + damping)
    matrix.diagonal().add_(further * mean)
    precisions = _squared_norms_of_inverse(lower).reciprocal().flip(0)
    return Hessian(matrix, lower.flip(0, 1), precisions, damping + further)


def _squared_norms_of_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Of the columns of L^-1 [n], some at a time: the whole would be one more n x n matrix."""
    norms = torch.empty_like(lower[0])
    for start in range(0, len(lower), _COLUMNS):
        below = lower[start:, start:]
        units = torch.eye(len(below), min(_COLUMNS, len(below))).to(lower)
        columns = torch.linalg.solve_triangular(below, units, upper=False)
        norms[start : start + _COLUMNS] = columns.square().sum(0)
    return norms
