"""Cholesky factor of a Gram that may be singular, with relative damping."""

from typing import NamedTuple

import torch

from offline_compress.linalg.symmetric import eigh, symmetrised

# GPTQ damps by 1e-2 of the mean diagonal; most Grams need none.
DAMPING_LADDER = (0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2)


class Cholesky(NamedTuple):
    """Lower factor L [n, n] in fp64 of C + damping * mean(diag C) * I."""

    factor: torch.Tensor
    damping: float


def cholesky(gram: torch.Tensor) -> Cholesky:
    """Factor a Gram [n, n] with the least damping of the ladder that works.

    Damping is relative to the mean diagonal, so it does not depend on the scale of the data; an
    all-zero Gram counts as one of scale 1.
    """
    symmetric = symmetrised(gram)
    mean = symmetric.diagonal().mean()
    ridge = torch.eye(len(symmetric)).to(symmetric) * (mean if mean > 0 else 1.0)
    for damping in DAMPING_LADDER:
        factor, info = torch.linalg.cholesky_ex(symmetric + damping * ridge)
        if not info:
            return Cholesky(factor, damping)
    # Rounding left the Gram indefinite beyond the ladder: project it on the PSD cone first.
    values, vectors = eigh(symmetric)
    projection = (vectors * values) @ vectors.T
    return Cholesky(torch.linalg.cholesky(projection + DAMPING_LADDER[-1] * ridge), damping)
