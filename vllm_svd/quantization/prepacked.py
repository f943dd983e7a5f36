"""Low-rank factors in half precision as a CPU's units for it want them: reordered once.

torch's own product would reorder a weight at every call, which for a decode step takes longer than
to multiply with it. vLLM's method for dense weights does it when they are loaded; what a layer
keeps is then the reordered form alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from vllm_svd.compat import UnquantizedLinearMethod
from vllm_svd.kernels.products import emulated
from vllm_svd.quantization.low_rank import LowRankMatrix
from vllm_svd.quantization.shards import Shard

HALVES = (torch.bfloat16, torch.float16)
Product = Callable[[torch.Tensor], torch.Tensor]


class LowRankProducts(NamedTuple):
    """Those of a layer whose shards are all low-rank: one into their latents, one out of each."""

    into: Product
    out_of: list[Product]


def low_rank_products(layer: Any, shards: Sequence[Shard]) -> LowRankProducts | None:
    """For the layer's shards, whose parameters A and B are then given up.

    None on a GPU, in other dtypes, with a shard of another kind, and where vLLM reorders nothing.
    """
    if not all(isinstance(shard.matrix, LowRankMatrix) for shard in shards):
        return None
    if layer.A.device.type != "cpu" or layer.A.dtype not in HALVES or emulated(layer.A):
        return None
    into = _product(layer.A.data.view(-1, shards[0].pieces["A"].shape[1]))
    if into is None:
        return None
    out_of = [product for shard in shards if (product := _product(shard.part(layer, "B")))]
    if len(out_of) < len(shards):
        return None
    for name in ("A", "B"):
        getattr(layer, name).data = torch.empty(0, dtype=layer.A.dtype)
    return LowRankProducts(into, out_of)


def _product(weight: torch.Tensor) -> Product | None:
    """x [..., n] times weight [m, n]; None if the weight was left as it is."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    method = UnquantizedLinearMethod()
    method.process_weights_after_loading(holder)
    return None if holder.weight.numel() else partial(method.apply, holder)
