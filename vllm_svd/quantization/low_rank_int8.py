"""Low-rank matrices in 8 bits with a tail in the model's dtype: y = B (A x).

Each factor is widened to the model's dtype for the one GEMM that reads it. Its scales belong to
ranks: their powers of two multiply the factor, which is exact and keeps sums where those of the
true factor are (whole steps overflow fp16); the rest multiplies the latent, r values a token.
Split over ranks as factors in the model's dtype are.
"""

import torch

from vllm_svd.kernels.products import linear
from vllm_svd.quantization.matrix import Matrix, Parts, whole


class LowRankInt8Matrix(Matrix):
    """A = [diag(A_scale) A_int8 | A_tail]; B the stack of B_int8 diag(B_scale) and B_tail."""

    def local(self) -> dict[str, tuple[slice, ...]]:
        module, rank = self.module, whole(self.module.rank)
        a_body, a_tail = _cut(self.columns, module.in_features - module.a_tail)
        b_body, b_tail = _cut(self.rows, module.out_features - module.b_tail)
        local = {
            "A_int8": (rank, a_body),
            "A_scale": (rank,),
            "B_int8": (b_body, rank),
            "B_scale": (rank,),
        }
        if module.a_tail:
            local["A_tail"] = (rank, a_tail)
        if module.b_tail:
            local["B_tail"] = (b_tail, rank)
        return local

    def multiply(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        body = parts["A_int8"].shape[1]
        power, rest = _split(parts["A_scale"], x)
        latent = linear(x[..., :body], _wide(parts["A_int8"], power[:, None])) * rest
        if self.module.a_tail:
            latent = latent + linear(x[..., body:], parts["A_tail"])
        power, rest = _split(parts["B_scale"], x)
        y = linear((latent * rest).to(x.dtype), _wide(parts["B_int8"], power))
        if self.module.b_tail:
            y = torch.cat([y, linear(latent.to(x.dtype), parts["B_tail"])], dim=-1)
        return y


def _split(scale: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [r] as powers of two in the dtype of x, and what is left of them in fp32."""
    rest, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent).to(x.dtype), rest


def _wide(steps: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """int8 steps times powers of two, in their dtype and in the one copy that makes them wide."""
    return steps.to(power.dtype).mul_(power)


def _cut(part: slice, body: int) -> tuple[slice, slice]:
    """What `part` of an axis takes of its first `body` elements, and of the tail after them."""
    first, last = min(part.start, body), min(part.stop, body)
    return slice(first, last), slice(max(part.start, body) - body, max(part.stop, body) - body)
