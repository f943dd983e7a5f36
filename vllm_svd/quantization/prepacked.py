"""Low-rank factors in half precision as a CPU's units for it want them: reordered once.

torch's own product would reorder a weight at every call, which for a decode step takes longer than
to multiply with it. vLLM's method for dense weights does it when they are loaded; what a layer
keeps is then the reordered form alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vllm_svd.compat import UnquantizedLinearMethod
from vllm_svd.kernels.products import emulated
from vllm_svd.quantization.low_rank import LowRankMatrix
from vllm_svd.quantization.shards import Shard

HALVES = (torch.bfloat16, torch.float16)
Product = Callable[[torch.Tensor], torch.Tensor]


class LowRankProducts:
    """Those of a layer all shards of which are low-rank: one into their latents, one out of each.

    The parameters A and B are given up for them.
    """

    def __init__(self, layer: Any, shards: Sequence[Shard]) -> None:
        columns = shards[0].pieces["A"].shape[1]
        self.into = _product(layer.A.data.view(-1, columns))
        self.out_of = [_product(shard.part(layer, "B")) for shard in shards]
        for name in ("A", "B"):
            getattr(layer, name).data = torch.empty(0, dtype=layer.A.dtype)


def low_rank_products(layer: Any, shards: Sequence[Shard]) -> LowRankProducts | None:
    """For the layer's shards; None on a GPU, in other dtypes, and with a shard of another kind."""
    if not all(isinstance(shard.matrix, LowRankMatrix) for shard in shards):
        return None
    if layer.A.device.type != "cpu" or layer.A.dtype not in HALVES or emulated(layer.A):
        return None
    return LowRankProducts(layer, shards)


def _product(weight: torch.Tensor) -> Product:
    """x [..., n] times weight [m, n]."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    method = UnquantizedLinearMethod()
    method.process_weights_after_loading(holder)
    return partial(method.apply, holder)
