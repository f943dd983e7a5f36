"""Linear layers kept as factors: y = B (A x), never expanded to the dense matrix.

The A of all shards of a fused layer are one matrix, so q, k and v (or gate and up) cost one
GEMM into the latents and one per shard out of them. Column-parallel layers replicate A and split
the rows of B; row-parallel layers split the columns of A and replicate B, so that the layer's own
all-reduce of B (A x) is right by linearity.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from vllm_svd.compat import LinearMethodBase, set_weight_attrs
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import LowRank
from vllm_svd.quantization.completeness import check_filled, unfilled
from vllm_svd.quantization.fused_shards import Shard, ShardId, local_shards, shard_index


class LowRankLinearMethod(LinearMethodBase):
    """Serves a linear layer of which at least one shard is low-rank; the others stay dense."""

    def __init__(self, factors: list[LowRank | None]) -> None:
        self.factors = factors

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,  # noqa: ARG002
        output_size: int,  # noqa: ARG002
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ARG002
    ) -> None:
        """Register A [sum of ranks, n], B [flat] and `weight` [dense rows, n] on the layer."""
        layer.svd_shards = shards = local_shards(layer, self.factors, output_partition_sizes)
        shapes = {
            "A": (shards[-1].latent.stop, input_size_per_partition),
            "B": (sum(s.rows * s.factors.rank for s in shards if s.factors),),
            # Empty where no shard is dense; vLLM's LoRA layers look for a `weight`.
            "weight": (sum(s.rows for s in shards if not s.factors), input_size_per_partition),
        }
        for name, shape in shapes.items():
            parameter = unfilled(*shape, dtype=params_dtype)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": _loader(layer, name)})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises CheckpointFormatError for tensors that never came."""
        check_filled(layer.prefix, {name: getattr(layer, name) for name in ("A", "B", "weight")})

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., n] to [..., sum of rows]."""
        latent = F.linear(x, layer.A)
        outputs = []
        for shard in layer.svd_shards:
            if shard.factors:
                up = layer.B[shard.place].view(shard.rows, shard.factors.rank)
                outputs.append(F.linear(latent[..., shard.latent], up))
            else:
                outputs.append(F.linear(x, layer.weight[shard.place]))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias


def _loader(layer: Any, name: str) -> Callable[..., None]:
    """Copies this rank's part of a checkpoint tensor A [r, n], B [m, r] or weight [m, n].

    The signature is vLLM's: reloading binds its arguments by name.
    """

    def load(
        param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        index = shard_index(shard_id)
        shard: Shard = layer.svd_shards[index]
        if (name == "weight") == (shard.factors is not None):
            kind = "low-rank" if shard.factors else "dense"
            raise _misfit(layer, f"shard {index} brings {name}, config.json makes it {kind}")
        columns = _columns(layer, param.shape[-1], loaded_weight.shape[-1])
        rows = shard.rows_of(loaded_weight.shape[0])
        if name == "A":
            target, local = param.data[shard.latent], loaded_weight[:, columns]
        elif name == "B":
            target, local = param.data[shard.place].view(shard.rows, -1), loaded_weight[rows]
        else:
            target, local = param.data[shard.place], loaded_weight[rows, columns]
        if target.shape != local.shape:
            raise _misfit(layer, f"shard {index}: {name} {list(loaded_weight.shape)} does not fit")
        target.copy_(local)

    return load


def _columns(layer: Any, local: int, stored: int) -> slice:
    """This rank's columns: all of them unless the layer is split along its input."""
    first = 0 if local == stored else layer.tp_rank * local
    return slice(first, first + local)


def _misfit(layer: Any, problem: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        layer.prefix, [problem], "restore config.json, or compress the model again"
    )
