"""A dense model of which one decoder block at a time has its weights."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_compress.families import fill_computed, head_dim, layer_paths, soft_capped
from offline_compress.weights import Source, meta_model
from vllm_svd.errors import SvdError

Read = Callable[[str], torch.Tensor]


class WeightError(SvdError):
    """Weights that are NaN or infinite."""


class Network:
    """Embedding, decoder blocks and head of a model, read from its shards when they are needed.

    Blocks are called as the model calls them: with its own masks and position embeddings.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.paths = layer_paths(source.config)
        model = cast(PreTrainedModel, meta_model(source.directory, source.config))
        self._model = model.eval().requires_grad_(False)
        self._base = model.base_model
        fill_computed(model, device)
        self._arguments: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @property
    def config(self) -> Any:
        return self._model.config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return head_dim(self.config)

    @property
    def rotary(self) -> nn.Module:
        """Gives the cosines and sines of positions."""
        found: nn.Module = self._base.rotary_emb
        return found

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Hidden states [samples, context, hidden] of token ids, before the first block."""
        if self._base.embed_tokens.weight.is_meta:
            self._fill(self._base.embed_tokens, "model.embed_tokens.", self.source.read)
        embedded: torch.Tensor = self._base.embed_tokens(windows.to(self.device))
        return embedded

    def block(self, index: int, read: Read | None = None) -> nn.Module:
        """A copy of the decoder block with its dense weights, in evaluation mode.

        Its attention has a config of its own, so that another attention function can be chosen
        for it alone.
        """
        block: nn.Module = copy.deepcopy(self._base.layers[index])
        self._fill(block, f"{self.paths[index]}.", read or self.source.read)
        return block

    def forward(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [samples, context, hidden] behind the block, which may be compressed."""
        args, kwargs = self._arguments_of(hidden)[index]
        output = block(hidden, *args, **kwargs)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [samples, context, vocabulary] of the hidden states behind the last block."""
        if self._base.norm.weight.is_meta:
            self._fill(self._base.norm, "model.norm.", self.source.read)
            head = "model.embed_tokens." if self.config.tie_word_embeddings else "lm_head."
            self._fill(self._model.lm_head, head, self.source.read)
        scores: torch.Tensor = self._model.lm_head(self._base.norm(hidden))
        return soft_capped(scores, self.config)

    def _fill(self, module: nn.Module, prefix: str, read: Read) -> None:
        """Give a module on the meta device its stored tensors, one at a time."""
        state = {name: self._placed(read(prefix + name)) for name in module.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype)

    def _arguments_of(self, hidden: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model passes to each block beside hidden states of this shape."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._arguments:
            layers = self._base.layers
            recorders = [_Recorder(layer) for layer in layers]
            recorders[-1].last = True
            self._base.layers = nn.ModuleList(recorders)
            try:
                with torch.no_grad():
                    self._base(inputs_embeds=hidden.detach(), use_cache=False)
            except _Recorded:
                pass
            finally:
                self._base.layers = layers
            self._arguments[shape] = [recorder.arguments for recorder in recorders]
        return self._arguments[shape]


def weight_of(root: nn.Module, path: str) -> torch.Tensor:
    """The weight [m, n] of the linear layer at `path`, compressed or not."""
    return cast(torch.Tensor, root.get_submodule(path).weight)


def bias_of(root: nn.Module, path: str) -> torch.Tensor | None:
    """The bias [m] of the linear layer at `path`, if it has one."""
    return cast(torch.Tensor | None, root.get_submodule(path).bias)


def finite_weight(root: nn.Module, path: str, prefix: str) -> torch.Tensor:
    """The weight [m, n] at `path` below `prefix`; raises WeightError if not all of it is finite."""
    weight = weight_of(root, path.removeprefix(prefix))
    if not torch.isfinite(weight).all():
        raise WeightError(
            f"{path}.weight holds values that are NaN or infinite\n"
            "Remedy: check the checkpoint for damaged weights, or copy it again"
        )
    return weight


class _Recorded(Exception):  # noqa: N818
    """The last block was reached."""


class _Recorder(nn.Module):
    """Stands in for a block and keeps what it was called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.last = False
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.arguments = (args, kwargs)
        if self.last:
            raise _Recorded
        return hidden
