"""Learned ranks: Dobi-SVD, Wang et al., ICLR 2025, arXiv 2502.02723.

Every matrix is truncated softly at a real position k, the gate of rank i being
0.5 tanh(beta (k - i)) + 0.5, and the calibration loss is descended in all k at once by Adam.

The paper holds the budget by a penalty lambda |budget(k) - target| of 200 to 400, which pulls all
matrices alike and outweighs what tells them apart. Here the budget is a constraint: the part of the
gradient along it is taken out, and the positions are shifted back onto it after each step. On the
spectral tails of tests/unit/test_learned.py (12 cases) 40 steps go 99 per cent of the way from
uniform ranks to the optimum, those of the paper's form 38, 70 and 92 per cent for a penalty of 1,
10 and 200; `penalty` restores it. With the paper's beta of 10 the loss is a staircase of k, flat
between whole ranks, and the steps go 82 per cent of the way; at 1 a gate spans a few ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from offline_compress.allocation.allocator import Allocator, Asks, Evidence, Matrix, Shares
from vllm_svd.errors import SvdError

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Learned(Allocator):
    """`steps` of Adam at `lr`, the share that a matrix gains or loses in the first; cosine decay.

    `beta` is the sharpness of the gates, for whoever computes the gated loss. Each step sees one
    window, in an order drawn from `seed`.
    """

    paper: ClassVar[str] = "Wang et al., ICLR 2025, arXiv 2502.02723"

    name: Literal["learned"] = "learned"
    steps: PositiveInt = 40
    lr: Annotated[float, Field(gt=0, le=1)] = 0.05
    beta: _Positive = 1.0
    penalty: _Positive | None = None
    seed: NonNegativeInt = 0

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"gates"})

    def windows_read(self, matrices: int) -> int:  # noqa: ARG002
        return 4 * self.steps

    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        """Whole ranks; raises SvdError that names a window whose loss is not finite.

        A matrix that no rank makes smaller has the share `kept`, as have all at a budget below one
        rank each or above the largest.
        """
        shares = dict.fromkeys(evidence.matrices, kept)
        matrices = {path: each for path, each in evidence.matrices.items() if each.share_of(1) < 1}
        budget = kept * sum(matrix.size for matrix in matrices.values())
        least = sum(each.share_of(1) * each.size for each in matrices.values())
        most = sum(each.share_of(each.largest_rank) * each.size for each in matrices.values())
        if not least < budget < most:
            return shares
        positions = self._positions(kept, replace(evidence, matrices=matrices))
        return shares | _whole(positions, budget, matrices)

    def _positions(self, kept: Fraction, evidence: Evidence) -> dict[str, float]:
        box = _Box(evidence.matrices, float(kept))
        shares = box.nearest(torch.full_like(box.high, float(kept))).requires_grad_()
        adam = torch.optim.Adam([shares], lr=self.lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        windows: list[int] = []
        evidence.progress("learned ranks", 0, self.steps)
        for step in range(self.steps):
            windows = windows or torch.randperm(evidence.windows, generator=generator).tolist()
            slope = _slope(shares, box, evidence, windows.pop())
            with torch.no_grad():
                if self.penalty is None:
                    shares.grad = box.along(slope, shares)
                else:
                    above = torch.sign(box.weight @ shares - box.kept)
                    shares.grad = slope + self.penalty * above * box.weight
                adam.step()
                decay.step()
                within = box.nearest(shares) if self.penalty is None else box.clamp(shares)
                shares.copy_(within)
            evidence.progress("learned ranks", step + 1, self.steps)
        positions = box.nearest(shares.detach()) / box.per_rank
        return dict(zip(evidence.matrices, positions.tolist(), strict=True))


class _Box:
    """The shares [matrices] of one rank and of the largest, and the budget that all must meet."""

    def __init__(self, matrices: Mapping[str, Matrix], kept: float) -> None:
        each = matrices.values()
        size = torch.tensor([matrix.size for matrix in each], dtype=torch.float64)
        self.per_rank = size.new_tensor([float(matrix.share_of(1)) for matrix in each])
        self.high = self.per_rank * size.new_tensor([matrix.largest_rank for matrix in each])
        self.weight, self.kept = size / size.sum(), kept

    def clamp(self, shares: torch.Tensor) -> torch.Tensor:
        return shares.clamp(self.per_rank, self.high)

    def nearest(self, shares: torch.Tensor) -> torch.Tensor:
        """All shares shifted alike onto the budget: bisection, which ends a hair below it."""
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            spent = self.weight @ self.clamp(shares + middle)
            low, high = (middle, high) if spent <= self.kept * (1 - 1e-12) else (low, middle)
        return self.clamp(shares + low)

    def along(self, slope: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The slope without what moves the budget, its price taken from matrices off the bounds."""
        free = (shares > self.per_rank) & (shares < self.high)
        if not free.any():
            return slope
        return slope - slope[free].sum() / self.weight[free].sum() * self.weight


def _slope(shares: torch.Tensor, box: _Box, evidence: Evidence, window: int) -> torch.Tensor:
    """The gradient of the loss of one window in the shares."""
    assert evidence.gated is not None  # asked for
    positions = dict(zip(evidence.matrices, shares / box.per_rank, strict=True))
    loss = evidence.gated(positions, window)
    (slope,) = torch.autograd.grad(loss, shares)
    if not (torch.isfinite(loss) and torch.isfinite(slope).all()):
        raise SvdError(
            f"the loss of calibration window {window}, or its gradient in the ranks, is NaN or "
            "infinite\nRemedy: check the checkpoint and the text, or choose another allocator"
        )
    return slope


def _whole(
    positions: Mapping[str, float], budget: Fraction, matrices: Mapping[str, Matrix]
) -> Shares:
    """Ranks rounded by largest remainder; what is less than a rank goes where there is room."""
    ranks = {path: math.floor(position) for path, position in positions.items()}
    cost = {path: matrix.share_of(1) * matrix.size for path, matrix in matrices.items()}
    slack = budget - sum(rank * cost[path] for path, rank in ranks.items())
    for path in sorted(ranks, key=lambda path: ranks[path] - positions[path]):
        if cost[path] <= slack and ranks[path] < matrices[path].largest_rank:
            ranks[path] += 1
            slack -= cost[path]
    shares = {path: matrices[path].share_of(rank) for path, rank in ranks.items()}
    for path, matrix in matrices.items():
        room = min(slack, (1 - shares[path]) * matrix.size)
        shares[path] += room / matrix.size
        slack -= room
    return shares
