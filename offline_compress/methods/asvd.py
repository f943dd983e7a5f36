"""ASVD: Yuan et al., "Activation-aware Singular Value Decomposition", arXiv 2312.05821.

W S = U Sigma V^T with S = diag(s) [n, n], s_j = (E|x_j|)^alpha; B = U_r, A = Sigma_r V_r^T S^-1.
Exact decomposition in place of the published code's randomised one; the ranks come from the plan.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from offline_compress.calibration import LayerStatistics, Needs
from offline_compress.linalg import left_of_matrix
from offline_compress.methods.method import Factorization, projected

_FLOOR = 1e-3  # of the median scale: a channel that calibration never excited keeps some weight


class Asvd(BaseModel):
    """Scales each input channel by its mean magnitude; alpha 0 is plain svd."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[Needs] = "mean_abs"

    name: Literal["asvd"] = "asvd"
    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5

    def scale(self, mean_abs: torch.Tensor) -> torch.Tensor:
        """s [n] in fp64, positive for any input, dead channels included."""
        scale = mean_abs.double().pow(self.alpha)
        floor = _FLOOR * scale.median()
        if not floor > 0:
            floor = _FLOOR * scale.mean()
        return scale.clamp_min(floor) if floor > 0 else torch.ones_like(scale)

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is diag(s^2)."""
        scaled = weight.double() * self.scale(statistics.gathered("mean_abs"))
        return projected(weight, left_of_matrix(scaled, rank))
