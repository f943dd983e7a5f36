"""FWSVD: Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022.

W S = U Sigma V^T with S = diag(f) [n, n], B = U_r [m, r], A = Sigma_r V_r^T S^-1 [r, n];
f_j^2 = sum_i E[(dL/dW_ij)^2], the empirical Fisher information of the weights that read input j.
A weight per entry has no closed form; collapsed to one per input, it is a scaling (arXiv
2207.00112). E is over samples: the square of an average over many would vanish with their number.
"""

from typing import ClassVar, Literal

import torch

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.linalg import floored, left_of_matrix, spectrum_of
from offline_compress.methods.method import Factorization, LowRankMethod, projected


class Fwsvd(LowRankMethod):
    """Scales each input channel by how much the loss depends on its weights."""

    paper: ClassVar[str] = "Hsu et al., ICLR 2022, arXiv 2207.00112"
    when: ClassVar[str] = "as the baseline of methods with gradients: one vector per input"

    name: Literal["fwsvd"] = "fwsvd"

    @property
    def needs(self) -> Needs:
        return frozenset({"fisher"})

    def scale(self, statistics: LayerStatistics) -> torch.Tensor:
        """f [n] in fp64, positive for any gradient, none at all included."""
        return floored(statistics.gathered("fisher").double().sqrt())

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is diag(f^2)."""
        scaled = weight.double() * self.scale(statistics)
        return projected(weight, left_of_matrix(scaled, rank))

    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        return spectrum_of(weight.double() * self.scale(statistics))
