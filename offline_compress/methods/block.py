"""One decoder layer as methods see it: its shapes before, its weights and statistics after."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offline_compress.calibration.statistics import LayerStatistics


@dataclass(frozen=True)
class Layer:
    """The linear layers of the decoder layer at `path`, by their paths, in execution order.

    `shapes` are [m, n]; `item_bytes` is the size of a stored weight. With `qk_norm` heads of
    queries and keys are normalised. The linear layers at `biased` have a bias.
    """

    path: str
    shapes: Mapping[str, tuple[int, int]]
    query_heads: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    qk_norm: bool = False
    biased: frozenset[str] = frozenset()

    def dense_bytes(self, path: str) -> int:
        """Bytes of one dense weight."""
        rows, columns = self.shapes[path]
        return rows * columns * self.item_bytes

    def linear(self, leaf: str) -> str:
        """The path that ends in `leaf`, e.g. q_proj; raises KeyError if there is none or several.

        Expert layers of a mixture have several of each; methods that join matrices group them by
        their common parent instead.
        """
        found = [path for path in self.shapes if path.endswith(f".{leaf}")]
        if len(found) != 1:
            raise KeyError(f"{self.path} has {len(found)} layers named {leaf}")
        return found[0]


@dataclass(frozen=True)
class Block:
    """Dense weights [m, n], biases and statistics of the matrices of one layer, by path.

    `base` holds the weights of the model it was fine-tuned from, for methods that need it.
    `query_energy` [query_heads, d] and `key_energy` [kv_heads, d] are the second moments of every
    channel of queries and keys, as RoPE receives them.
    """

    layer: Layer
    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor | None]
    statistics: Mapping[str, LayerStatistics]
    base: Mapping[str, torch.Tensor] | None = None
    query_energy: torch.Tensor | None = None
    key_energy: torch.Tensor | None = None
