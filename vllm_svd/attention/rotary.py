"""Mode `pre` caches keys before RoPE: the model's rotary module must leave the key alone.

Models assign `self.attn` after `self.rotary_emb`. torch's registration hook shows us that
assignment with the parent in hand, where the rotary module is wrapped.
"""

from functools import cache

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from vllm_svd.attention.implementation import LatentImpl
from vllm_svd.compat import Attention, RotaryEmbedding
from vllm_svd.errors import UnsupportedModelError


class QueryRotary(torch.nn.Module):
    """The wrapped rotary embedding, applied to the query only."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [tokens]; query is rotated, key returned as it came."""
        rotated, _ = self.rotary(positions, query, None)
        return rotated, key


@cache
def watch_for_rotary() -> None:
    """Install the hook once per process."""
    register_module_module_registration_hook(_wrap_rotary)


def _wrap_rotary(parent: torch.nn.Module, _name: str, child: torch.nn.Module | None) -> None:
    if not isinstance(child, Attention) or not isinstance(child.impl, LatentImpl):
        return
    impl = child.impl
    if not impl.needs_rotary:
        return
    rotary = getattr(parent, "rotary_emb", None)
    if rotary is None:
        return  # reported once the weights are loaded, with the layer's name
    if getattr(type(rotary), "forward_native", None) is not RotaryEmbedding.forward_native:
        raise UnsupportedModelError(
            f"{child.layer_name}: mode pre cannot rebuild keys for {type(rotary).__name__}",
            "rotary embeddings with one table of cosines and sines (default, Llama 3, YaRN, ...)",
            "compress the model with --kv-mode post",
        )
    impl.rotary = rotary
    parent.rotary_emb = QueryRotary(rotary)
