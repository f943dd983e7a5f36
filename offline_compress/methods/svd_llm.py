"""SVD-LLM: Wang et al., "Truncation-aware SVD for LLM Compression", ICLR 2025, arXiv 2403.07378.

min E||(W - B A) x||^2: W S = U Sigma V^T for any S S^T = C [n, n], B = U_r, A = Sigma_r V_r^T S^-1.
For m <= n, U are the eigenvectors of W C W^T [m, m], the inverse-free form of Swift-SVD (arXiv
2604.01609); for m > n, S = L of Cholesky and L^T W^T W L [n, n]. Both take A = U_r^T W.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from offline_compress.calibration import LayerStatistics, Needs
from offline_compress.linalg import cholesky, left_of_gram, left_of_matrix
from offline_compress.methods.method import Factorization, projected


class SvdLlm(BaseModel):
    """Optimal at its rank for the calibration inputs: dropping sigma_i costs sigma_i^2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[Needs] = "gram"

    name: Literal["svd_llm"] = "svd_llm"

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is the Gram, without damping."""
        rows, columns = weight.shape
        gram = statistics.gathered("gram").double()
        if not gram.trace() > 0:  # inputs never seen alive say nothing: plain truncation
            found = projected(weight, left_of_matrix(weight.double(), rank))
        else:
            form = output_form if rows <= columns else input_form
            found = form(weight, gram, rank)
        return replace(found, loss=found.factors.output_error(weight, gram))


def output_form(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factorization:
    """Through W C W^T [m, m]: holds for a singular C as it is."""
    double = weight.double()
    return projected(weight, left_of_gram(double @ gram.double() @ double.T, rank))


def input_form(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factorization:
    """Through L^T W^T W L [n, n]: smaller than the output form when m > n."""
    factor, damping = cholesky(gram)
    return projected(weight, left_of_matrix(weight.double() @ factor, rank), damping)
