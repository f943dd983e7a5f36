"""Plain truncated SVD: Eckart and Young, Psychometrika 1 (1936).

min ||W - B A||_F over B [m, r], A [r, n]: W = U Sigma V^T, B = U_r, A = Sigma_r V_r^T.
"""

from typing import ClassVar, Literal

import torch

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.linalg import left_of_matrix, spectrum_of
from offline_compress.methods.method import Factorization, LowRankMethod, projected


class Svd(LowRankMethod):
    """Ignores the data: every input direction counts the same."""

    paper: ClassVar[str] = "Eckart and Young, Psychometrika 1 (1936)"
    when: ClassVar[str] = "as the baseline that every other method must beat"

    name: Literal["svd"] = "svd"

    @property
    def needs(self) -> Needs:
        return frozenset()

    def factorize(
        self,
        weight: torch.Tensor,
        statistics: LayerStatistics,  # noqa: ARG002
        rank: int,
    ) -> Factorization:
        """The metric of the loss is the identity."""
        return projected(weight, left_of_matrix(weight.double(), rank))

    def spectrum(
        self,
        weight: torch.Tensor,
        statistics: LayerStatistics,  # noqa: ARG002
    ) -> torch.Tensor:
        return spectrum_of(weight.double())
