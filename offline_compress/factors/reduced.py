"""A dense submatrix of the kept rows and columns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from offline_compress.factors.factors import Factors
from vllm_svd.format import Reduced


@dataclass(frozen=True)
class ReducedFactors(Factors):
    """y[rows] = reduced @ x[columns], the other outputs zero, for W of `shape` [m, n].

    `reduced` is [kept_out, kept_in]; `rows` and `columns` are ascending int32 indices, None where
    all are kept.
    """

    reduced: torch.Tensor
    shape: tuple[int, int]
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        reduced: torch.Tensor,
        shape: tuple[int, int],
        *,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        correction: torch.Tensor | None = None,
    ) -> "ReducedFactors":
        """From ascending indices, which may be all there are."""

        def proper(kept: torch.Tensor | None, size: int) -> torch.Tensor | None:
            if kept is None or len(kept) == size:
                return None
            return kept.to(reduced.device, torch.int32)

        return cls(
            reduced, shape, proper(rows, shape[0]), proper(columns, shape[1]), correction=correction
        )

    def dense(self) -> torch.Tensor:
        wide = _spread(self.reduced.double(), self.columns, self.shape[1])
        return _spread(wide.T, self.rows, self.shape[0]).T

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        return _spread(functional.linear(x, self.reduced.to(x)), self.rows, self.shape[0])

    def config(self) -> Reduced:
        out_features, in_features = self.shape
        kept_out, kept_in = self.reduced.shape
        return Reduced(
            out_features=out_features,
            in_features=in_features,
            kept_out=kept_out,
            kept_in=kept_in,
            correction=self.correction is not None,
        )

    def parts(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.config().parts()}

    @classmethod
    def of_parts(cls, config: Reduced, parts: Mapping[str, torch.Tensor]) -> "ReducedFactors":
        shape = (config.out_features, config.in_features)
        return cls(parts["reduced"], shape, parts.get("rows"), parts.get("columns"))


def _spread(x: torch.Tensor, kept: torch.Tensor | None, size: int) -> torch.Tensor:
    """x [..., kept] at its places among `size`, zeros elsewhere."""
    if kept is None:
        return x
    return x.new_zeros(*x.shape[:-1], size).index_copy_(-1, kept.long(), x)
