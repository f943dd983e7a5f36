"""Two factors in the model's dtype."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from offline_compress.factors.factors import Factors
from vllm_svd.format import LowRank


@dataclass(frozen=True)
class LowRankFactors(Factors):
    """W [m, n] is approximated by B [m, r] @ A [r, n]."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def dense(self) -> torch.Tensor:
        return self.B.double() @ self.A.double()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.A.to(x)), self.B.to(x))

    def config(self) -> LowRank:
        return LowRank(
            out_features=self.B.shape[0],
            in_features=self.A.shape[1],
            rank=self.rank,
            correction=self.correction is not None,
        )

    def parts(self) -> dict[str, torch.Tensor]:
        return {"A": self.A, "B": self.B}

    @classmethod
    def of_parts(cls, config: LowRank, parts: Mapping[str, torch.Tensor]) -> "LowRankFactors":
        del config
        return cls(parts["A"], parts["B"])
