"""The linear method of layers with compressed matrices: every shard in the artefact it is stored.

Low-rank shards share one GEMM into their latents: their A, one after another in the layer's
parameter, are one matrix. Other shards, and dense ones, stand beside them at no cost to it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_svd.compat import LinearMethodBase, set_weight_attrs
from vllm_svd.errors import CheckpointFormatError, UnsupportedModelError
from vllm_svd.format import Module
from vllm_svd.kernels.products import linear
from vllm_svd.quantization.completeness import check_filled, unfilled
from vllm_svd.quantization.low_rank import LowRankMatrix
from vllm_svd.quantization.prepacked import LowRankProducts, low_rank_products
from vllm_svd.quantization.shards import Shard, ShardId, local_shards, shard_index

_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F32": torch.float32}


class ShardedLinearMethod(LinearMethodBase):
    """Serves a linear layer of which at least one shard is compressed; None stands for dense."""

    def __init__(self, modules: Sequence[Module | None]) -> None:
        self.modules = modules

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,  # noqa: ARG002
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ARG002
    ) -> None:
        """Register a flat parameter for every name of a part that one of the shards has."""
        layer.svd_shards = shards = local_shards(
            layer, self.modules, output_partition_sizes, output_size, input_size_per_partition
        )
        layer.svd_products = None
        # Empty where no shard is dense; vLLM's LoRA layers look for a `weight`.
        elements, dtypes = {"weight": 0}, {"weight": params_dtype}
        for shard in shards:
            for name, piece in shard.pieces.items():
                elements[name] = piece.place.stop
                dtypes[name] = _DTYPES[piece.stored.dtype] if piece.stored.dtype else params_dtype
        for name, count in elements.items():
            parameter = unfilled(count, dtype=dtypes[name])
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": _loader(layer, name)})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises CheckpointFormatError for tensors that never came, or make no sense."""
        shards: list[Shard] = layer.svd_shards
        if layer.svd_products is not None and not layer.A.numel():
            return  # nothing came since factors were reordered
        check_filled(
            layer.prefix,
            {
                f"shard {index}: {name}": part
                for index, shard in enumerate(shards)
                for name, part in shard.parts(layer).items()
            },
        )
        problems = [why for shard in shards for why in shard.matrix.problems(shard.parts(layer))]
        if problems:
            raise CheckpointFormatError(layer.prefix, problems, "compress the model again")
        layer.svd_products = low_rank_products(layer, shards)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., n] to [..., sum of rows]."""
        products: LowRankProducts | None = layer.svd_products
        latents = x
        if products is not None:
            latents = products.into(x)
        elif hasattr(layer, "A"):
            latents = linear(x, layer.A.view(-1, x.shape[-1]))
        outputs = []
        for index, shard in enumerate(layer.svd_shards):
            matrix = shard.matrix
            if products is not None:
                # Not every kernel of vLLM reads rows that lie apart.
                y = products.out_of[index](latents[..., shard.channels].contiguous())
            elif isinstance(matrix, LowRankMatrix):
                y = matrix.expand(latents[..., shard.channels], shard.parts(layer))
            else:
                y = matrix.multiply(x, shard.parts(layer))
            outputs.append(y + shard.part(layer, "correction") if matrix.corrects else y)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias


def _loader(layer: Any, name: str) -> Callable[..., None]:
    """Copies this rank's part of a checkpoint tensor.

    The signature is vLLM's: reloading binds its arguments by name.
    """

    def load(
        param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        index = shard_index(shard_id)
        shard: Shard = layer.svd_shards[index]
        piece = shard.pieces.get(name)
        if piece is None:
            kind = getattr(shard.matrix.module, "kind", "dense")
            raise _misfit(layer, f"shard {index} brings {name}, config.json makes it {kind}")
        if tuple(loaded_weight.shape) != piece.stored.shape:
            found, expected = list(loaded_weight.shape), list(piece.stored.shape)
            raise _misfit(layer, f"shard {index}: {name} is {found}, config.json says {expected}")
        if loaded_weight.is_floating_point() != param.is_floating_point():
            raise _misfit(layer, f"shard {index}: {name} is of {loaded_weight.dtype}")
        if param.numel() < piece.place.stop:
            raise UnsupportedModelError(
                f"{layer.prefix}: {name} was loaded again where it had been reordered for this CPU",
                "weights that are loaded once, or by reload_weights from a whole checkpoint",
                "start the server again with the other weights",
            )
        param.data[piece.place].view(piece.shape).copy_(loaded_weight[piece.index])

    return load


def _misfit(layer: Any, problem: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        layer.prefix, [problem], "restore config.json, or compress the model again"
    )
