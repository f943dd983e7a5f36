"""What a method returns for one weight."""

from dataclasses import dataclass

import torch

from vllm_svd.format import LowRank


@dataclass(frozen=True)
class LowRankFactors:
    """W [m, n] is approximated by B [m, r] @ A [r, n]."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def dense(self) -> torch.Tensor:
        """B A [m, n], in fp64."""
        return self.B.double() @ self.A.double()

    def to(self, dtype: torch.dtype) -> "LowRankFactors":
        """The factors as they will be stored."""
        return LowRankFactors(self.A.to(dtype), self.B.to(dtype))

    def output_error(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        """tr(E C E^T) / tr(W C W^T), the relative output error: E = W - B A, C the Gram [n, n]."""
        reference, second_moment = weight.double(), gram.double()
        total = _energy(reference, second_moment)
        lost = _energy(reference - self.dense(), second_moment)
        return lost / total if total > 0 else 0.0

    def config(self) -> LowRank:
        """The entry of this weight in the checkpoint's config."""
        return LowRank(out_features=self.B.shape[0], in_features=self.A.shape[1], rank=self.rank)

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of the linear layer at `path`."""
        return {f"{path}.A": self.A.contiguous(), f"{path}.B": self.B.contiguous()}


def _energy(matrix: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(M C M^T)."""
    return float(torch.dot((matrix @ gram).flatten(), matrix.flatten()))
