"""SVD-LLM: Wang et al., "Truncation-aware SVD for LLM Compression", ICLR 2025, arXiv 2403.07378.

min E||(W - B A) x||^2: W S = U Sigma V^T for any S S^T = C [n, n], B = U_r, A = Sigma_r V_r^T S^-1.
For m <= n, U are the eigenvectors of W C W^T [m, m], the inverse-free form of Swift-SVD (arXiv
2604.01609); for m > n, S = L of Cholesky and L^T W^T W L [n, n]. Both take A = U_r^T W.

The layer-wise update of the paper's first versions then holds A and fits B to the inputs x' that
the compressed layers before leave: min E||(W - B A) x'||^2, B = W C' A^T (A C' A^T)^-1. The
published version fine-tunes the factors of the whole model instead, every B and then every A: see
offline_compress/recovery.py.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.factors import LowRankFactors
from offline_compress.linalg import (
    cholesky,
    eigh,
    left_of_gram,
    left_of_matrix,
    regressed,
    spectrum_of,
)
from offline_compress.methods.method import Factorization, LowRankMethod, Recovery, projected


class SvdLlm(LowRankMethod):
    """Optimal at its rank for the calibration inputs: dropping sigma_i costs sigma_i^2.

    With `recover` the factors are then fine-tuned on the calibration text, the whole model at once.
    """

    paper: ClassVar[str] = "Wang et al., ICLR 2025, arXiv 2403.07378"
    when: ClassVar[str] = "low rank without gradients: the best per-matrix truncation"

    name: Literal["svd_llm"] = "svd_llm"
    update: bool = False
    recover: Recovery | None = None

    @property
    def recovery(self) -> Recovery | None:
        return self.recover

    @property
    def needs(self) -> Needs:
        gram: Needs = frozenset({"gram"})
        return gram | {"shifted_gram"} if self.update else gram

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is the Gram, without damping; with `update` the shifted Gram."""
        rows, columns = weight.shape
        gram = statistics.gathered("gram").double()
        if not gram.trace() > 0:  # inputs never seen alive say nothing: plain truncation
            found = projected(weight, left_of_matrix(weight.double(), rank))
        else:
            form = output_form if rows <= columns else input_form
            found = form(weight, gram, rank)
        if self.update:
            gram = statistics.gathered("shifted_gram").double()
            found = updated(weight, gram, found)
        return replace(found, loss=found.factors.output_error(weight, gram))

    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        """Of the truncation; what an update recovers is not known before it."""
        rows, columns = weight.shape
        gram, double = statistics.gathered("gram").double(), weight.double()
        if rows <= columns:
            return eigh(double @ gram @ double.T).values
        return spectrum_of(double @ cholesky(gram).factor)


def output_form(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factorization:
    """Through W C W^T [m, m]: holds for a singular C as it is."""
    double = weight.double()
    return projected(weight, left_of_gram(double @ gram.double() @ double.T, rank))


def input_form(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factorization:
    """Through L^T W^T W L [n, n]: smaller than the output form when m > n."""
    factor, damping = cholesky(gram)
    return projected(weight, left_of_matrix(weight.double() @ factor, rank), damping)


def updated(weight: torch.Tensor, gram: torch.Tensor, found: Factorization) -> Factorization:
    """The same A with the best B for inputs of this Gram [n, n].

    Solved for the change of B, from what the truncation leaves of W: damping then pulls B to where
    it was, not to zero, so the error never rises and dead inputs change nothing.
    """
    factors = found.factors
    assert isinstance(factors, LowRankFactors)  # of the forms above, never of a user
    latent = gram @ factors.A.T
    change, damping = regressed((weight.double() - factors.dense()) @ latent, factors.A @ latent)
    moved = LowRankFactors(A=factors.A, B=factors.B + change)
    return replace(found, factors=moved, damping=max(found.damping, damping))
