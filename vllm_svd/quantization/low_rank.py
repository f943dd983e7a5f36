"""Linear layers kept as factors: y = B (A x), never expanded to the dense matrix.

The A of all shards of a fused layer are one matrix, so q, k and v (or gate and up) cost one
GEMM into the latents and one per shard out of them. Column-parallel layers replicate A and split
the rows of B; row-parallel layers split the columns of A and replicate B, so that the layer's own
all-reduce of B (A x) is right by linearity.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from vllm_svd.compat import LinearMethodBase, set_weight_attrs
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import LowRank
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
        input_size: int,
        output_size: int,  # noqa: ARG002
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ARG002
    ) -> None:
        """Register A [sum of ranks, n], B [flat] and `weight` [dense rows, n] on the layer."""
        row_parallel = input_size_per_partition != input_size
        shards = local_shards(layer, self.factors, output_partition_sizes, row_parallel)
        first_column = layer.tp_rank * input_size_per_partition if row_parallel else 0
        columns = slice(first_column, first_column + input_size_per_partition)
        layer.svd_shards = shards
        layer.svd_loaded = set()

        def register(name: str, *shape: int) -> None:
            parameter = torch.nn.Parameter(
                torch.empty(*shape, dtype=params_dtype), requires_grad=False
            )
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": partial(_load, layer, name, columns)})

        register("A", shards[-1].latent.stop, input_size_per_partition)
        register("B", sum(s.rows * s.factors.rank for s in shards if s.factors))
        # Empty where no shard is dense; vLLM's LoRA layers look for a `weight`.
        register("weight", sum(s.rows for s in shards if not s.factors), input_size_per_partition)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises CheckpointFormatError for tensors that never came: vLLM does not notice."""
        expected = {
            (name, index)
            for index, shard in enumerate(layer.svd_shards)
            for name in (("A", "B") if shard.factors else ("weight",))
        }
        if missing := sorted(expected - layer.svd_loaded):
            raise CheckpointFormatError(
                layer.prefix,
                [f"shard {index} has no {name}" for name, index in missing],
                "the checkpoint is incomplete; copy it again or compress the model again",
            )

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


def _load(
    layer: Any,
    name: str,
    columns: slice,
    parameter: torch.nn.Parameter,
    tensor: torch.Tensor,
    shard_id: ShardId = None,
) -> None:
    """Copy this rank's part of a checkpoint tensor A [r, n], B [m, r] or weight [m, n]."""
    index = shard_index(shard_id)
    shard: Shard = layer.svd_shards[index]
    expected = _checkpoint_shapes(shard, tensor).get(name)
    if tuple(tensor.shape) != expected:
        raise CheckpointFormatError(
            layer.prefix,
            [f"shard {index} brings {name} {list(tensor.shape)}, expected {expected or 'none'}"],
            "compress the model again",
        )
    rows = slice(shard.first_row, shard.first_row + shard.rows)
    if name == "A":
        parameter.data[shard.latent].copy_(tensor[:, columns])
    elif name == "B":
        parameter.data[shard.place].copy_(tensor[rows].flatten())
    else:
        parameter.data[shard.place].copy_(tensor[rows, columns])
    layer.svd_loaded.add((name, index))


def _checkpoint_shapes(shard: Shard, tensor: torch.Tensor) -> dict[str, tuple[int, ...]]:
    if shard.factors is None:
        return {"weight": tuple(tensor.shape)}
    rank = shard.factors.rank
    return {"A": (rank, shard.factors.in_features), "B": (shard.factors.out_features, rank)}
