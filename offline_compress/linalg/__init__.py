"""Dense fp64 linear algebra that factorisations share."""

from offline_compress.linalg.cholesky import DAMPING_LADDER, Cholesky, cholesky
from offline_compress.linalg.regression import Regression, regressed
from offline_compress.linalg.relative_noise import relative_noise
from offline_compress.linalg.scale import floored
from offline_compress.linalg.symmetric import Spectrum, eigh, symmetrised
from offline_compress.linalg.truncation import Truncation, left_of_gram, left_of_matrix, spectrum_of

__all__ = [
    "DAMPING_LADDER",
    "Cholesky",
    "Regression",
    "Spectrum",
    "Truncation",
    "cholesky",
    "eigh",
    "floored",
    "left_of_gram",
    "left_of_matrix",
    "regressed",
    "relative_noise",
    "spectrum_of",
    "symmetrised",
]
