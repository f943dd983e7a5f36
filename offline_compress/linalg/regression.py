"""Least squares from second moments."""

from typing import NamedTuple

import torch

from offline_compress.linalg.cholesky import cholesky
from offline_compress.linalg.symmetric import symmetrised

# Sums of r products carry errors of r 2^-53, 5e-13 at r = 4096: a smaller pivot is rounding, and
# a quotient by it is noise.
_LEAST = 1e-12


class Regression(NamedTuple):
    """Coefficients [k, r] in fp64, and the damping relative to the mean diagonal of the Gram."""

    coefficients: torch.Tensor
    damping: float


def regressed(cross: torch.Tensor, gram: torch.Tensor) -> Regression:
    """argmin over B [k, r] of E||y - B z||^2 + ridge ||B||^2: B (G + ridge I) = cross.

    cross is E[y z^T] [k, r] and the Gram G is E[z z^T] [r, r], which may be singular.
    """
    damped = symmetrised(gram)
    damped.diagonal().add_(_LEAST * damped.diagonal().mean())
    factor, damping = cholesky(damped)
    return Regression(torch.cholesky_solve(cross.double().T, factor).T, _LEAST + damping)
