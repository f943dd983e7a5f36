"""Leading left singular vectors of a matrix, and what dropping the others costs."""

from dataclasses import dataclass

import torch

from offline_compress.linalg.symmetric import eigh


@dataclass(frozen=True)
class Truncation:
    """Orthonormal basis U [m, r] in fp64 and the dropped tail, a fraction of the squared norm."""

    basis: torch.Tensor
    loss: float


def left_of_gram(gram: torch.Tensor, rank: int) -> Truncation:
    """Leading left singular vectors of X [m, k], given X X^T [m, m]."""
    values, vectors = eigh(gram)
    return Truncation(vectors[:, :rank], _tail(values, rank))


def left_of_matrix(matrix: torch.Tensor, rank: int) -> Truncation:
    """Leading left singular vectors of X [m, k], from the smaller of X X^T and X^T X.

    For m > k, U spans the columns of X V; QR makes it orthonormal without dividing by the
    singular values, so it holds for X of any rank.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        return left_of_gram(matrix @ matrix.T, rank)
    values, vectors = eigh(matrix.T @ matrix)
    basis, _ = torch.linalg.qr(matrix @ vectors[:, :rank])
    return Truncation(basis, _tail(values, rank))


def spectrum_of(matrix: torch.Tensor) -> torch.Tensor:
    """Squared singular values [min(m, k)] of X [m, k], descending, in fp64."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    return eigh(gram).values


def _tail(values: torch.Tensor, rank: int) -> float:
    total = values.sum()
    return float(values[rank:].sum() / total) if total > 0 else 0.0
