"""Two factors in 8 bits with one scale per rank, and a tail in the model's dtype."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from offline_compress.factors.factors import Factors
from vllm_svd.format import LowRankInt8

_LARGEST = 127


@dataclass(frozen=True)
class LowRankInt8Factors(Factors):
    """A [r, n] and B [m, r] as vllm_svd.format.LowRankInt8 stores them."""

    A_int8: torch.Tensor
    A_scale: torch.Tensor
    A_tail: torch.Tensor
    B_int8: torch.Tensor
    B_scale: torch.Tensor
    B_tail: torch.Tensor

    @classmethod
    def quantize(
        cls,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        a_tail: int = 0,
        b_tail: int = 0,
    ) -> "LowRankInt8Factors":
        """Round the factors A [r, n] and B [m, r] to nearest, the scale of a rank its largest
        entry; the last `a_tail` columns of A and `b_tail` rows of B stay as they are.
        """
        a_body, b_body = A.shape[1] - a_tail, B.shape[0] - b_tail
        a_int8, a_scale = _rounded(A[:, :a_body])
        b_int8, b_scale = _rounded(B[:b_body].T)
        return cls(a_int8, a_scale, A[:, a_body:], b_int8.T.contiguous(), b_scale, B[b_body:])

    @property
    def rank(self) -> int:
        return len(self.A_scale)

    @property
    def A(self) -> torch.Tensor:  # noqa: N802
        """Dequantised [r, n], in fp64."""
        body = self.A_int8.double() * self.A_scale.double()[:, None]
        return torch.cat([body, self.A_tail.double()], dim=1)

    @property
    def B(self) -> torch.Tensor:  # noqa: N802
        """Dequantised [m, r], in fp64."""
        return torch.cat([self.B_int8.double() * self.B_scale.double(), self.B_tail.double()])

    def dense(self) -> torch.Tensor:
        return self.B @ self.A

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.A.to(x)), self.B.to(x))

    def config(self) -> LowRankInt8:
        return LowRankInt8(
            out_features=len(self.B_int8) + len(self.B_tail),
            in_features=self.A_int8.shape[1] + self.A_tail.shape[1],
            rank=self.rank,
            a_tail=self.A_tail.shape[1],
            b_tail=len(self.B_tail),
            correction=self.correction is not None,
        )

    def parts(self) -> dict[str, torch.Tensor]:
        described = self.config().parts()
        return {name: getattr(self, name) for name in described}

    @classmethod
    def of_parts(
        cls, config: LowRankInt8, parts: Mapping[str, torch.Tensor]
    ) -> "LowRankInt8Factors":
        scale = parts["A_scale"]
        return cls(
            parts["A_int8"],
            scale,
            parts.get("A_tail", scale.new_empty(config.rank, 0)),
            parts["B_int8"],
            parts["B_scale"],
            parts.get("B_tail", scale.new_empty(0, config.rank)),
        )


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [r, k] and fp32 scales [r] of rows [r, k].

    A row that fp32 has no normal scale for, one of zeros among them, becomes zero at scale 1.
    """
    wide = rows.double()
    scale = (wide.abs().amax(1) / _LARGEST if rows.shape[1] else wide.new_zeros(len(rows))).float()
    held = scale >= torch.finfo(torch.float32).tiny
    scale = scale.where(held, 1)
    steps = (wide / scale.double()[:, None]).round() * held[:, None]
    return steps.to(torch.int8), scale
