"""Routed experts as ordinary linear layers, under the names that checkpoints give them."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_compress.families.family import Family, layer_paths


class Expert(nn.Module):
    """down_proj(act(gate_proj x) * up_proj x), of gate_up [2 i, n] (gate above up) and down [n, i].

    The weights are copied; tensors on the meta device stay there.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """The experts of one layer; stands where transformers keeps them in two 3-D parameters."""

    @classmethod
    def of(cls, fused: Any) -> "Experts":
        """From a module with gate_up_proj [E, 2 i, n] and down_proj [E, n, i]."""
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        return cls(Expert(gate_up, down, fused.act_fn) for gate_up, down in pairs)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, n]: the sum of the k experts [tokens, k] of each token, by their weights.

        An expert sees its own tokens only, and is not called when there are none. The sum is taken
        in fp32 at least.
        """
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros_like(hidden_states, dtype=wide)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if len(token):
                out = expert(hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, out.to(wide))
        return total.to(hidden_states.dtype)


def unfuse(model: PreTrainedModel, family: Family) -> None:
    """Replace the fused experts of a transformers model by `Experts`, which copy their weights.

    The state dict then has the names and shapes of the checkpoint. Nothing is allocated for a model
    on the meta device; elsewhere one layer's experts exist twice at a time. Models without experts
    and unfused ones stay as they are.
    """
    for index, layer in enumerate(layer_paths(model.config)):
        if not family.routed_experts(model.config, index):
            continue
        mlp = model.get_submodule(f"{layer}.{family.mlp}")
        if not isinstance(mlp.experts, Experts):
            mlp.experts = Experts.of(mlp.experts)


def _linear(weight: torch.Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")  # not initialised in vain
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear
