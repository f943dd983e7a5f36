"""The KV method of a projected attention layer: bases, reduced cache, backend, implementation.

vLLM calls create_weights() as the last step of Attention.__init__ with the layer in hand, which
is where the layer becomes a LatentAttention; nothing of vLLM itself is replaced.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_svd.attention.implementation import LatentImpl, ProjectingImpl
from vllm_svd.attention.layer import LatentAttention, make_latent
from vllm_svd.compat import (
    BaseKVCacheMethod,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    set_weight_attrs,
)
from vllm_svd.errors import CheckpointFormatError, UnsupportedModelError
from vllm_svd.format import KVProjection
from vllm_svd.kernels import latent_attention, latent_store, native
from vllm_svd.kernels.products import widened
from vllm_svd.quantization.completeness import check_filled, unfilled

BASES = ("k_down", "k_up", "v_down", "v_up")
REORDERED = ("k_up", "v_up")  # of which machine code keeps a form of its own


class LatentKVMethod(BaseKVCacheMethod):
    """Serves one attention layer through the projections of its K and V channels."""

    def __init__(self, quant_config: Any, projection: KVProjection) -> None:
        super().__init__(quant_config)
        self.projection = projection

    def create_weights(self, layer: Any) -> None:
        """Register this rank's bases and reduce the layer's cache; raises UnsupportedModelError."""
        if isinstance(layer, LatentAttention):
            return  # vLLM calls again when weights are reloaded; the bases keep their loaders
        projection = self.projection
        tp_size = get_tensor_model_parallel_world_size()
        local_heads = max(1, projection.num_kv_heads // tp_size)
        if (layer.num_kv_heads, layer.head_size) != (local_heads, projection.head_dim):
            raise CheckpointFormatError(
                layer.layer_name,
                [
                    f"the model has {layer.num_kv_heads} KV heads of {layer.head_size} on this "
                    f"rank, the projections are for {local_heads} of {projection.head_dim}"
                ],
                "config.json does not belong to these projections; compress the model again",
            )
        # Heads are replicated when there are more ranks than heads.
        first_head = get_tensor_model_parallel_rank() * projection.num_kv_heads // tp_size
        heads = slice(first_head, first_head + local_heads)
        group = projection.group
        groups = slice(heads.start // group, heads.stop // group)
        for tensor, stored in projection.tensors("").items():
            name = tensor.rpartition(".")[2]
            mine = groups if name.endswith("_down") else heads
            shape = (mine.stop - mine.start, *stored.shape[1:])
            basis = unfilled(*shape, dtype=torch.get_default_dtype())
            layer.register_parameter(name, basis)
            set_weight_attrs(basis, {"weight_loader": _loader(layer, mine)})
        make_latent(layer, projection)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises if a basis never came, or if no rotary module was bound in mode `pre`."""
        check_filled(layer.layer_name, {name: getattr(layer, name) for name in BASES})
        # What every step reads in place is small, and kept in fp32 where it would be widened.
        projecting = isinstance(layer.impl, ProjectingImpl)
        for name in BASES:
            basis = getattr(layer, name)
            if projecting and native.is_there() and name in REORDERED:
                continue
            basis.data = basis.data.float() if projecting else widened(basis.data)
        if not isinstance(layer.impl, LatentImpl):
            return
        latent_attention.prepare(layer.k_down.device)
        latent_store.prepare(layer.k_down.device)
        if layer.impl.needs_rotary:
            raise UnsupportedModelError(
                f"{layer.layer_name}: the model's rotary embedding was not found beside it",
                "attention modules that hold `rotary_emb` and `attn`, as Llama and Qwen do",
                "compress the model with --kv-mode post",
            )


def _loader(layer: Any, heads: slice) -> Callable[..., None]:
    """Copies this rank's heads, or groups, of a basis [heads, ...]; the signature is vLLM's."""

    def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        local = loaded_weight[heads]
        if local.shape != param.shape:
            raise CheckpointFormatError(
                layer.layer_name,
                [f"a basis is {list(loaded_weight.shape)}; {list(param.shape)} of it is needed"],
                "restore config.json, or compress the model again",
            )
        param.data.copy_(local)
        if isinstance(layer.impl, LatentImpl):
            layer.impl.layout.memo.clear()  # kernels keep what they made of the former ones

    return load
