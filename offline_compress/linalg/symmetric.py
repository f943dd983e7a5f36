"""Eigendecomposition of symmetric positive semidefinite matrices in fp64."""

from typing import NamedTuple

import torch


class Spectrum(NamedTuple):
    """Eigenvalues [n], descending and never negative, and eigenvectors [n, n] as columns."""

    values: torch.Tensor
    vectors: torch.Tensor


def symmetrised(matrix: torch.Tensor) -> torch.Tensor:
    """(M + M^T) / 2 in fp64, [n, n]."""
    double = matrix.double()
    return (double + double.T).div_(2)


def eigh(matrix: torch.Tensor) -> Spectrum:
    """Spectrum of a PSD matrix [n, n]; what rounding made negative becomes zero.

    The matrix is scaled to a largest entry of 1 first: squares of very large or very small
    activations stay clear of the limits of fp64.
    """
    symmetric = symmetrised(matrix)
    scale = symmetric.abs().max()
    if not scale > 0:
        return Spectrum(symmetric.diagonal().clone(), torch.eye(len(symmetric)).to(symmetric))
    values, vectors = torch.linalg.eigh(symmetric / scale)
    return Spectrum(values.flip(0).clamp_min(0) * scale, vectors.flip(1))
