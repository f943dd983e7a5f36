"""K/V channel projections inside a transformers model: keys and values pass through the latent."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from offline_compress.families import Family
from offline_compress.kv.projection import KVBases
from vllm_svd.codec import stored
from vllm_svd.errors import SvdError
from vllm_svd.format import Side, Tier

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
# What computes attention, and the mask that it reads; of eager functions the one with soft caps.
_FUNCTIONS: dict[str, tuple[Attend, Callable[..., torch.Tensor | None]]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (eager_attention_forward, eager_mask),
}


class LatentKV(nn.Module):
    """The bases of one attention layer: buffers named as in the checkpoint.

    The cache of a server holds `down @ k` and `down @ v`, in as many bits as its tiers say; here
    both are expanded at once, which is the same function of the hidden states (the value's
    expansion is linear, so it commutes with the attention weights). The first `exact` positions of
    every sequence pass as they are: not what a server does, but what its sinks would gain by it.
    """

    exact = 0

    def __init__(self, bases: KVBases) -> None:
        super().__init__()
        self.post = bases.config.mode == "post"
        self.k_tiers, self.v_tiers = bases.config.k_tiers, bases.config.v_tiers
        self.k_down, self.k_up = nn.Buffer(bases.k_down), nn.Buffer(bases.k_up)
        self.v_down, self.v_up = nn.Buffer(bases.v_down), nn.Buffer(bases.v_up)

    def pass_key(self, _module: nn.Module, _inputs: Any, key: torch.Tensor) -> torch.Tensor:
        """Forward hook: the key before RoPE, through its latent."""
        return self._mixed(key, _through(key, self.k_down, self.k_up, self.k_tiers))

    def pass_value(self, _module: nn.Module, _inputs: Any, value: torch.Tensor) -> torch.Tensor:
        """Forward hook: the value, through its latent."""
        return self._mixed(value, _through(value, self.v_down, self.v_up, self.v_tiers))

    def _mixed(self, x: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, : self.exact], through[:, self.exact :]], 1)

    def latent_query_key(
        self, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated query and key [samples, heads, tokens, d] in the k_rank channels of the cache."""
        read = query.reshape(len(query), len(self.k_up), -1, *query.shape[2:])
        group = len(self.k_up) // len(self.k_down)
        samples, _, tokens, size = key.shape
        by_group = key.reshape(samples, -1, group, tokens, size).transpose(2, 3)
        of_group = by_group.reshape(samples, -1, tokens, group * size)
        latent = stored(of_group @ self.k_down.mT, self.k_tiers)
        return (read @ self.k_up[:, None]).flatten(1, 2), latent.repeat_interleave(group, 1)


def install_kv(layer: nn.Module, family: Family, path: str, bases: KVBases) -> None:
    """Make the attention of a decoder layer read its keys and values through `bases`.

    `pre` keys pass through the latent before RoPE. `post` gives this attention a config of its own
    with an attention function that projects the rotated query and key. `path` names the attention
    in errors: SvdError if it already has bases or its heads have another shape.
    """
    attention: Any = layer.get_submodule(family.attention)
    if hasattr(attention, "attn"):
        raise SvdError(
            f"{path}: K/V projections are already installed\nRemedy: start from the dense model"
        )
    _attach(layer, family, path, bases, ("key", "value"))


def hold_exactly(model: nn.Module, positions: int) -> None:
    """Let so many first positions pass every installed projection; all of them must be `pre`."""
    for module in model.modules():
        if isinstance(module, LatentKV):
            if module.post:
                raise ValueError("rotated queries and keys meet in the latent's channels alone")
            module.exact = positions


@contextmanager
def kv_installed(
    layer: nn.Module, family: Family, path: str, bases: KVBases, side: Side
) -> Iterator[None]:
    """Meanwhile only the keys, or only the values, of the layer are read through `bases`."""
    undo = _attach(layer, family, path, bases, (side,))
    try:
        yield
    finally:
        for step in undo:
            step()


def _attach(
    layer: nn.Module, family: Family, path: str, bases: KVBases, sides: Sequence[Side]
) -> list[Callable[[], object]]:
    """Install, and return what takes it away again."""
    attention: Any = layer.get_submodule(family.attention)
    config = bases.config
    found = (attention.config.num_key_value_heads, attention.head_dim)
    if found != (config.num_kv_heads, config.head_dim):
        raise SvdError(
            f"{path}: bases for {config.num_kv_heads} KV heads of size {config.head_dim}; the "
            f"layer has {found[0]} of size {found[1]}\nRemedy: project this very layer"
        )
    like = cast(torch.Tensor, layer.get_submodule("input_layernorm").weight)  # never packed
    attention.attn = latent = LatentKV(bases.to(like.dtype)).to(like.device)
    undo: list[Callable[[], object]] = [lambda: delattr(attention, "attn")]
    hooks: list[tuple[str, Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]]] = []
    if "value" in sides:
        hooks.append((family.value_output, latent.pass_value))
    if "key" in sides and latent.post:
        before = attention.config
        undo.append(lambda: setattr(attention, "config", before))
        _switch_attention(attention)
    elif "key" in sides:
        hooks.append((family.key_output, latent.pass_key))
    for module, hook in hooks:
        undo.append(layer.get_submodule(module).register_forward_hook(hook).remove)
    return undo


def in_latent_channels(attend: Attend) -> Attend:
    """The attention function for `post` layers; mask, scale and soft cap are the model's own."""

    def attend_latents(
        module: Any, query: torch.Tensor, key: torch.Tensor, *others: Any, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attend(module, *module.attn.latent_query_key(query, key), *others, **settings)

    return attend_latents


def _switch_attention(attention: Any) -> None:
    of_model = attention.config._attn_implementation
    if of_model not in _FUNCTIONS:
        raise SvdError(
            f"attention {of_model!r} cannot read projected keys of mode post: accepted are "
            f"{', '.join(_FUNCTIONS)}\nRemedy: load the model with attn_implementation='sdpa'"
        )
    attend, mask = _FUNCTIONS[of_model]
    name = f"svd_latent_{of_model}"
    AttentionInterface.register(name, in_latent_channels(attend))
    AttentionMaskInterface.register(name, mask)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = name


def _through(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, tiers: Sequence[Tier]
) -> torch.Tensor:
    """up down x per group, for x [..., heads * d] or with the heads already apart."""
    groups = x.reshape(*x.shape[:2], len(down), -1)
    latent = stored(torch.einsum("bshd,hrd->bshr", groups, down), tiers)
    together = up.reshape(len(down), -1, up.shape[2])
    return torch.einsum("bshr,hdr->bshd", latent, together).reshape(x.shape)
