"""What calibration says about the keys and values of one attention layer, and who reads them."""

from dataclasses import dataclass

import torch

from vllm_svd.format import Mode


@dataclass(frozen=True)
class KVStatistics:
    """Moments [groups, g d, g d] in fp64, uncentred, averaged over `tokens` calibration tokens.

    A group is g neighbouring KV heads, whose keys (or values) stand one after the other.
    key_moment: E[k k^T], of the key before RoPE (`pre`) or after it (`post`).
    query_metric: E[q q^T] summed over the query heads that read a KV head; rotated for `post`,
    averaged over relative positions (rope.Rope.read_metric) for `pre`.
    value_moment: E[v v^T]. output_metric: W_o^T W_o summed over the same query heads.
    Both metrics are block diagonal: a query reads one head, and attention weights differ by head.
    """

    mode: Mode
    key_moment: torch.Tensor
    query_metric: torch.Tensor
    value_moment: torch.Tensor
    output_metric: torch.Tensor
    tokens: int
