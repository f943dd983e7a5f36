"""Soft truncation of a matrix, with a gradient that stays finite for any singular values.

After Dobi-SVD (Wang et al., ICLR 2025, arXiv 2502.02723): Y = U diag(g s) V^T of A = U diag(s) V^T
[T, m], with q = min(T, m) singular values and gates g_i = 0.5 tanh(beta (k - i)) + 0.5.

The gradient with respect to A holds 1 / (s_j^2 - s_i^2) of every pair of singular values. Written
for Y, and not for U and V apart, each such factor carries g_j - g_i, so that a pair that shares its
gate needs no division at all; with rho <= 1 the ratio of the two, the rest is scale-free:

    core_ij = (g_i + g_j) / 2 P_ij + |g_j - g_i| / (1 - rho^2) ((1 + rho^2) / 2 P_ij + rho P_ji)

for gates that descend and P = U^T dY V. As in the paper 1 / (1 - rho^2) is a finite geometric
series of rho^2 (at rho = 1, where Y has no derivative, the number of its terms), and pairs of tiny
singular values, whose directions are noise, get a constant: 0. The paper sums 11 terms, for nearly
equal pairs only, which biases every pair within 5 per cent. Closed, the sum is the same work for
any number of terms: with 1000 it serves all pairs, exact to rounding for those 2 per cent apart.
"""

from typing import Any

import torch

_TERMS = 1000


def soft_gate(position: torch.Tensor, ranks: int, beta: float) -> torch.Tensor:
    """Gates [ranks] of a real position (scalar): 0.5 tanh(beta (position - i)) + 0.5.

    i is the middle of each rank, 0.5, 1.5, ...: an integer position keeps that many ranks, and
    the gates add up to it where neither end of the spectrum is within a few 1 / beta.
    """
    middles = torch.arange(ranks, device=position.device, dtype=position.dtype) + 0.5
    return 0.5 * torch.tanh(beta * (position - middles)) + 0.5


def soft_truncated(matrix: torch.Tensor, position: torch.Tensor, beta: float) -> torch.Tensor:
    """U diag(g s) V^T of a matrix [T, m], in its dtype; differentiable in the real position too."""
    ranks = min(matrix.shape)
    if not ranks:
        return matrix
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    gates = soft_gate(position.to(wide), ranks, beta)
    truncated: torch.Tensor = GatedSvd.apply(wide, gates)  # type: ignore[no-untyped-call]
    return truncated.to(matrix.dtype)


class GatedSvd(torch.autograd.Function):
    """U diag(g s) V^T of A [T, m] in fp32 or fp64, and gates g [min(T, m)]."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        ctx.save_for_backward(left, values, right, gates)
        truncated: torch.Tensor = (left * (gates * values)) @ right
        return truncated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        left, values, right, gates = ctx.saved_tensors
        inner = left.T @ upstream @ right.T
        to_gates = values * inner.diagonal()
        if not ctx.needs_input_grad[0]:
            return None, to_gates
        # What leaves the span of U, or that of V, was scaled by g s / s: no division there.
        outside = (upstream @ right.T - left @ inner) * gates @ right
        outside += left * gates @ (left.T @ upstream - inner @ right)
        noise = torch.finfo(values.dtype).eps * max(upstream.shape)
        core = _core(inner, values.where(values > noise * values[0], 0), gates)
        return left @ core @ right + outside, to_gates


def _core(inner: torch.Tensor, values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The gradient [q, q] within the spans of U and V, given P; exact zeros count as noise."""
    larger = torch.maximum(values[:, None], values)
    ratio = torch.minimum(values[:, None], values) / larger.where(larger > 0, 1)
    order = torch.arange(len(values), device=values.device)
    ordered = (gates - gates[:, None]) * torch.sign(order[:, None] - order)
    turned = (1 + ratio.square()) / 2 * inner + ratio * inner.T
    turned = turned.where(larger > 0, 0)
    return (gates + gates[:, None]) / 2 * inner + ordered * _series(ratio) * turned


def _series(ratio: torch.Tensor) -> torch.Tensor:
    """1 + rho^2 + rho^4 + ... of `_TERMS` terms: 1 / (1 - rho^2) without its pole."""
    log = 2 * torch.log(ratio)
    total = torch.expm1(_TERMS * log) / torch.expm1(log)
    return total.where(ratio < 1, _TERMS)
