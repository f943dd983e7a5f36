"""ASVD: Yuan et al., "Activation-aware Singular Value Decomposition", arXiv 2312.05821.

W S = U Sigma V^T with S = diag(s) [n, n], B = U_r [m, r], A = Sigma_r V_r^T S^-1 [r, n];
s_j = (E|x_j|)^alpha or (max|x_j|)^alpha. Exact decomposition in place of the published code's
randomised one; the ranks come from the plan.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from offline_compress.calibration.statistics import LayerStatistics, Moment, Needs
from offline_compress.linalg import floored, left_of_matrix, spectrum_of
from offline_compress.methods.method import Factorization, LowRankMethod, projected

_MOMENTS: dict[str, Moment] = {"abs_mean": "mean_abs", "abs_max": "max_abs"}


class Asvd(LowRankMethod):
    """Scales each input channel by its magnitude; alpha 0 is plain svd."""

    paper: ClassVar[str] = "Yuan et al., arXiv 2312.05821"
    when: ClassVar[str] = "calibration must be nearly free: one vector per input"

    name: Literal["asvd"] = "asvd"
    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    scaling: Literal["abs_mean", "abs_max"] = "abs_mean"

    @property
    def needs(self) -> Needs:
        return frozenset({_MOMENTS[self.scaling]})

    def scale(self, statistics: LayerStatistics) -> torch.Tensor:
        """s [n] in fp64, positive for any input, dead channels included."""
        magnitude = statistics.gathered(_MOMENTS[self.scaling])
        return floored(magnitude.double().pow(self.alpha))

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is diag(s^2)."""
        scaled = weight.double() * self.scale(statistics)
        return projected(weight, left_of_matrix(scaled, rank))

    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        return spectrum_of(weight.double() * self.scale(statistics))
