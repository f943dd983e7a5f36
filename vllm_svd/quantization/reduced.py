"""Dense submatrices of pruned layers: y[rows] = reduced @ x[columns], the other outputs are zero.

A layer cannot know that its neighbour was pruned alike: gate and up scatter into the full width,
and down gathers from it. That costs two copies of the activations a pair of layers, no GEMM.
"""

from typing import Any

import torch

from vllm_svd.errors import UnsupportedModelError
from vllm_svd.kernels.products import linear
from vllm_svd.quantization.matrix import Matrix, Parts, length, whole


class ReducedMatrix(Matrix):
    """`reduced` [kept_out, kept_in], and `rows`, `columns` where an axis was pruned.

    Raises UnsupportedModelError where ranks would share out a pruned axis: how much of it each
    one keeps is not in config.json.
    """

    def __init__(self, module: Any, rows: slice, columns: slice, where: str) -> None:
        super().__init__(module, rows, columns, where)
        axes = {
            "outputs": (rows, module.out_features, module.kept_out),
            "inputs": (columns, module.in_features, module.kept_in),
        }
        split = [
            name for name, (part, size, kept) in axes.items() if kept < size and length(part) < size
        ]
        if split:
            raise UnsupportedModelError(
                f"{where} lost some of its {' and '.join(split)}, which tensor parallelism splits",
                "pruned layers on one rank, or split along an axis of which all is kept",
                "start vLLM with --tensor-parallel-size 1, or make the model dense again with "
                "offline-compress restore",
            )

    def local(self) -> dict[str, tuple[slice, ...]]:
        module = self.module
        pruned_rows = module.kept_out < module.out_features
        pruned_columns = module.kept_in < module.in_features
        rows = whole(module.kept_out) if pruned_rows else self.rows
        columns = whole(module.kept_in) if pruned_columns else self.columns
        local: dict[str, tuple[slice, ...]] = {"reduced": (rows, columns)}
        if pruned_rows:
            local["rows"] = (rows,)
        if pruned_columns:
            local["columns"] = (columns,)
        return local

    def multiply(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        if "columns" in parts:
            x = x.index_select(-1, parts["columns"])
        y = linear(x, parts["reduced"])
        if "rows" in parts:
            full = y.new_zeros(*y.shape[:-1], self.module.out_features)
            y = full.index_copy_(-1, parts["rows"].long(), y)
        return y

    def problems(self, parts: Parts) -> list[str]:
        """Indices beyond the matrix would be read and written wherever they point."""
        sizes = {"rows": self.module.out_features, "columns": self.module.in_features}
        return [
            f"{self.where}: {name} holds indices outside 0 to {size - 1}"
            for name, size in sizes.items()
            if name in parts and not _inside(parts[name], size)
        ]


def _inside(index: torch.Tensor, size: int) -> bool:
    return bool(index.min() >= 0) and bool(index.max() < size)
