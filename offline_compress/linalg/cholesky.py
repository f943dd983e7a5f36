"""Cholesky factor of a Gram that may be singular, with relative damping."""

from typing import NamedTuple

import torch

from offline_compress.linalg.symmetric import eigh, symmetrised

# GPTQ damps by 1e-2 of the mean diagonal; most Grams need none. Below 1e-8 the rungs are for a
# channel of outliers, which raises the mean diagonal far above all others.
DAMPING_LADDER = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2)


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
    unit = mean if mean > 0 else torch.ones_like(mean)
    diagonal = symmetric.diagonal().clone()
    for damping in DAMPING_LADDER:
        symmetric.diagonal().copy_(diagonal + damping * unit)
        factor, info = torch.linalg.cholesky_ex(symmetric)
        if not info:
            return Cholesky(factor, damping)
    # Rounding left the Gram indefinite beyond the ladder: project it on the PSD cone first.
    symmetric.diagonal().copy_(diagonal)
    values, vectors = eigh(symmetric)
    projection = (vectors * values) @ vectors.T
    projection.diagonal().add_(damping * unit)
    return Cholesky(torch.linalg.cholesky(projection), damping)
