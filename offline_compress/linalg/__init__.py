"""Dense fp64 linear algebra that factorisations share."""

from offline_compress.linalg.cholesky import DAMPING_LADDER, Cholesky, cholesky
from offline_compress.linalg.symmetric import Spectrum, eigh, symmetrised
from offline_compress.linalg.truncation import Truncation, left_of_gram, left_of_matrix

__all__ = [
    "DAMPING_LADDER",
    "Cholesky",
    "Spectrum",
    "Truncation",
    "cholesky",
    "eigh",
    "left_of_gram",
    "left_of_matrix",
    "symmetrised",
]
