"""SVD-LLM V2: Wang et al., NAACL 2025, arXiv 2503.12340: truncation without Cholesky.

C = Q diag(lam) Q^T [n, n], S = Q diag(sqrt(lam)), W S = U Sigma V^T; B = U_r [m, r],
A = U_r^T W [r, n]. The published A = Sigma_r V_r^T S^-1 is the same where C has full rank. Where it
has not, A is free on the null space of C: the published one needs a pseudo-inverse, thus a decision
on which lam are zero, and maps directions that calibration did not see to zero; U_r^T W needs
neither and keeps as much of W there as B can express.
"""

from typing import ClassVar, Literal

import torch

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.linalg import eigh, left_of_gram, left_of_matrix, spectrum_of
from offline_compress.methods.method import Factorization, LowRankMethod, projected


class SvdLlmV2(LowRankMethod):
    """The optimum of svd_llm, exact and undamped for any Gram.

    The paper's ranks by truncation loss are the allocator `truncation_loss`.
    """

    paper: ClassVar[str] = "Wang et al., NAACL 2025, arXiv 2503.12340"
    when: ClassVar[str] = "svd_llm with fewer calibration tokens than channels: no damping"
    allocator: ClassVar[str] = "truncation_loss"

    name: Literal["svd_llm_v2"] = "svd_llm_v2"

    @property
    def needs(self) -> Needs:
        return frozenset({"gram"})

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is the Gram."""
        rows, columns = weight.shape
        double, gram = weight.double(), statistics.gathered("gram").double()
        if not gram.trace() > 0:  # inputs never seen alive say nothing: plain truncation
            truncation = left_of_matrix(double, rank)
        elif rows <= columns:  # W S S^T W^T needs no root
            truncation = left_of_gram(double @ gram @ double.T, rank)
        else:
            truncation = left_of_matrix(double @ _root(gram), rank)
        return projected(weight, truncation)

    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        rows, columns = weight.shape
        double, gram = weight.double(), statistics.gathered("gram").double()
        if rows <= columns:
            return eigh(double @ gram @ double.T).values
        return spectrum_of(double @ _root(gram))


def _root(gram: torch.Tensor) -> torch.Tensor:
    """S [n, n] with S S^T = C, of a PSD C of any rank."""
    values, vectors = eigh(gram)
    return vectors * values.sqrt()
