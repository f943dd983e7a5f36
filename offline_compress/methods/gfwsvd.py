"""GFWSVD: Chekalina et al., "Generalized Fisher-Weighted SVD", arXiv 2505.17974.

min tr(Y (W - B A) X (W - B A)^T), the loss to second order if the Fisher information of W is
X (x) Y. With Y = L L^T [m, m] and U_r the leading eigenvectors of L^T W X W^T L [m, m]:
B = L^-T U_r [m, r], A = U_r^T L^T W [r, n]; no root or inverse of X. For m > n the same of W^T,
with X and Y exchanged, so that only the smaller side is factored.

X = E[x x^T] [n, n] and Y = E[g g^T] over tokens, g the gradient of a token's output, as in K-FAC
(Martens and Grosse, arXiv 1503.05671). The paper fits both to gradients of W over whole batches.
Those are sums over tokens, which cancel near an optimum, and there are as few as batches: what they
never move in has no weight, and truncation drops it at no loss (rank collapse). Tokens do not
cancel, and there are more of them than channels.
"""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.factors import LowRankFactors
from offline_compress.linalg import cholesky, eigh, left_of_gram
from offline_compress.methods.method import Factorization, LowRankMethod

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Whitened(NamedTuple):
    """W [k, l] with its larger side last, L [k, k] of the smaller and the energy in its metric."""

    weight: torch.Tensor
    factor: torch.Tensor
    damping: float
    energy: torch.Tensor


class Gfwsvd(LowRankMethod):
    """Weighs the errors of outputs by what they do to the loss, those of inputs by how often.

    Each metric is (1 - shrinkage) of itself and the rest a multiple of I of its mean diagonal.
    Output shrinkage 1 leaves svd_llm, both 1 plain svd.
    """

    paper: ClassVar[str] = "Chekalina et al., arXiv 2505.17974"
    when: ClassVar[str] = "a backward pass is affordable: the loss decides which outputs matter"

    name: Literal["gfwsvd"] = "gfwsvd"
    input_shrinkage: Share = 0.1
    output_shrinkage: Share = 0.3

    @property
    def needs(self) -> Needs:
        return frozenset({"gram", "output_gram"})

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The loss is tr(Y E X E^T) / tr(Y W X W^T), E = W - W', in the metrics as shrunk and, for
        the smaller side, damped. Columns of B (m <= n) or rows of A (m > n) have length 1.
        """
        wide, factor, damping, energy = self._whitened(weight, statistics)
        truncation = left_of_gram(energy, rank)
        spanned = torch.linalg.solve_triangular(factor.T, truncation.basis, upper=True)
        size = spanned.norm(dim=0)  # unit columns: fp16 holds them however ill-conditioned L is
        outer = spanned / size
        inner = size[:, None] * (truncation.basis.T @ (factor.T @ wide))
        tall = weight.shape[0] > weight.shape[1]
        factors = LowRankFactors(A=outer.T, B=inner.T) if tall else LowRankFactors(A=inner, B=outer)
        return Factorization(factors, truncation.loss, damping)

    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        energy = self._whitened(weight, statistics).energy
        scale = _mean(statistics.gathered("gram")) * _mean(statistics.gathered("output_gram"))
        return eigh(energy).values * scale

    def _whitened(self, weight: torch.Tensor, statistics: LayerStatistics) -> _Whitened:
        rows, columns = weight.shape
        wide = weight.double()
        smaller = statistics.gathered("output_gram"), self.output_shrinkage
        larger = statistics.gathered("gram"), self.input_shrinkage
        if rows > columns:
            wide, smaller, larger = wide.T, larger, smaller
        factor, damping = cholesky(_shrunk(*smaller))
        return _Whitened(wide, factor, damping, factor.T @ _energy(wide, *larger) @ factor)


def _mean(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal().double().mean()


def _shrunk(gram: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """The metric M of a Gram, of mean diagonal 1; the identity if it is zero."""
    mean = _mean(gram)
    if not mean > 0:
        return torch.eye(len(gram)).to(gram.double())
    metric = gram.double() * ((1 - shrinkage) / mean)
    metric.diagonal().add_(shrinkage)
    return metric


def _energy(weight: torch.Tensor, gram: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """W M W^T [k, k] for the metric M [l, l] of a Gram, which is never formed."""
    plain, mean = weight @ weight.T, _mean(gram)
    if not mean > 0:
        return plain
    return weight @ gram.double() @ weight.T * ((1 - shrinkage) / mean) + shrinkage * plain
