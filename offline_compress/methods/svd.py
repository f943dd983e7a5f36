"""Plain truncated SVD: Eckart and Young, Psychometrika 1 (1936).

min ||W - B A||_F over B [m, r], A [r, n]: W = U Sigma V^T, B = U_r, A = Sigma_r V_r^T.
"""

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from offline_compress.calibration import LayerStatistics, Needs
from offline_compress.linalg import left_of_matrix
from offline_compress.methods.method import Factorization, projected


class Svd(BaseModel):
    """Ignores the data: every input direction counts the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[Needs] = "nothing"

    name: Literal["svd"] = "svd"

    def factorize(
        self,
        weight: torch.Tensor,
        statistics: LayerStatistics,  # noqa: ARG002
        rank: int,
    ) -> Factorization:
        """The metric of the loss is the identity."""
        return projected(weight, left_of_matrix(weight.double(), rank))
