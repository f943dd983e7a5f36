"""Low-rank matrices in the model's dtype: y = B (A x), never expanded to the dense matrix.

Column-parallel layers replicate A and split the rows of B; row-parallel layers split the columns
of A and replicate B, so that the layer's own all-reduce of B (A x) is right by linearity.
"""

import torch

from vllm_svd.kernels.products import linear
from vllm_svd.quantization.matrix import Matrix, Parts, whole


class LowRankMatrix(Matrix):
    """A [r, columns] and B [rows, r]."""

    def local(self) -> dict[str, tuple[slice, ...]]:
        rank = whole(self.module.rank)
        return {"A": (rank, self.columns), "B": (self.rows, rank)}

    def multiply(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        return self.expand(linear(x, parts["A"]), parts)

    def expand(self, latent: torch.Tensor, parts: Parts) -> torch.Tensor:
        """latent [..., r] to [..., rows]; the shards of a layer share the GEMM into it."""
        return linear(latent, parts["B"])
