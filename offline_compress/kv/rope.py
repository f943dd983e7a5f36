"""Rotary position embedding (RoFormer, arXiv:2104.09864) as the model itself computes it."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Rope:
    """The rotary module of a model, whatever its frequency scaling; half-split channel pairs."""

    module: nn.Module

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """R_p x for x [..., positions, d] and integer positions [positions], in x's dtype."""
        like = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = (
            angle[0].to(x.dtype) for angle in self.module(like, positions.to(x.device)[None])
        )
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        rotated: torch.Tensor = x * cos + turned * sin
        return rotated

    def read_metric(self, query_moment: torch.Tensor, reach: int) -> torch.Tensor:
        """Metric [heads, d, d] along which a key is read before RoPE, given Q = E[q q^T] so too.

        The score of a query at m and a key at n is (R_m q)^T (R_n k) = (R_(m-n) q)^T k, hence the
        metric is the mean of R_D Q R_D^T over D in {0, 1, 2, 4, ... <= reach}.
        """
        offsets = [0]
        while (following := max(1, 2 * offsets[-1])) <= reach:
            offsets.append(following)
        query_moment = query_moment.double()
        total = torch.zeros_like(query_moment)
        for offset in offsets:
            # rotating the rows of Q gives Q R^T, and the rows of its transpose R Q R^T
            total += self._rotate_rows(self._rotate_rows(query_moment, offset).mT, offset)
        return total / len(offsets)

    def _rotate_rows(self, matrix: torch.Tensor, offset: int) -> torch.Tensor:
        return self.rotate(matrix[..., None, :], torch.tensor([offset]))[..., 0, :]
