"""What a compression method is: a frozen config that factorises one weight at a rank it is told."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from offline_compress.calibration import LayerStatistics, Needs
from offline_compress.linalg import Truncation
from offline_compress.methods.factors import LowRankFactors


@dataclass(frozen=True)
class Factorization:
    """Factors in fp64 and what they lose.

    `loss` is tr(E M E^T) / tr(W M W^T) with E = W - B A, in the metric M [n, n] that the method
    minimises: the dropped tail. For svd_llm M is the Gram itself, without the damping, which is
    relative to its mean diagonal.
    """

    factors: LowRankFactors
    loss: float
    damping: float = 0.0


class Method(Protocol):
    """A member of the recipe's union: pydantic, frozen, told apart by `name`."""

    needs: ClassVar[Needs]

    @property
    def name(self) -> str: ...

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """Approximate W [m, n] by B [m, rank] @ A [rank, n]."""
        ...


def workspace_bytes(out_features: int, in_features: int) -> int:
    """fp64 bytes that factorising W [m, n] takes at most, beside W and its Gram.

    Five matrices of the shape of W (copies and errors of it, both factors) and six of its smaller
    side squared (eigenvectors and LAPACK's workspace); measured within 1.4 times the real peak.
    """
    smaller = min(out_features, in_features)
    return 8 * (5 * out_features * in_features + 6 * smaller * smaller)


def projected(weight: torch.Tensor, truncation: Truncation, damping: float = 0.0) -> Factorization:
    """B = U and A = U^T W, the best factors whose output lies in the span of U [m, r].

    With U the left singular vectors of W S this is B = U, A = Sigma V^T S^-1 without the inverse,
    so S may be singular.
    """
    basis = truncation.basis
    factors = LowRankFactors(A=basis.T @ weight.double(), B=basis)
    return Factorization(factors, truncation.loss, damping)
