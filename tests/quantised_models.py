"""Dense checkpoints quantised as the libraries do that users have: rounding to nearest, no more."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
Parts = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantised(dense: Path, out: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a one-file checkpoint whose linear layers of the blocks are quantised.

    Layers that do not divide into groups stay dense, and are named so. `dense.reference` beside the
    model, which no loader reads, holds what the others stand for.
    """
    quantise, config = METHODS[name]
    shutil.copytree(dense, out)
    held, whole, left = {}, {}, []
    for tensor, value in load_file(out / "model.safetensors").items():
        path = tensor.removesuffix(".weight")
        divides = not any(size % GROUP for size in value.shape)
        if path.endswith("_proj") and not divides:
            left.append(path)
        if path.endswith("_proj") and divides:
            parts, whole[tensor] = quantise(value.float())
            held |= {f"{path}.{part}": found.contiguous() for part, found in parts.items()}
        else:
            held[tensor] = value.to(dtype)
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    save_file(whole, out / "dense.reference")
    raw = json.loads((out / "config.json").read_text())
    names = "ignore" if "config_groups" in config else "modules_to_not_convert"
    config = config | {names: [*config.get(names, []), *left]}
    raw |= {"quantization_config": config, "dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(raw))
    return out


def weights_of(directory: Path) -> Parts:
    """The dense weights that the quantised layers stand for."""
    return load_file(directory / "dense.reference")


def _levels(
    weight: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [m, n], scales and zeros [m, groups] of 2**bits levels a group of columns."""
    groups, top = weight.unflatten(1, (-1, GROUP)), (1 << bits) - 1
    if symmetric:
        scale = groups.abs().amax(-1) / (top // 2)
        zero = torch.full_like(scale, (top + 1) // 2)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round()
    scale = scale.half().float()
    level = (groups / scale[..., None] + zero[..., None]).round().clamp(0, top)
    return level.flatten(1).int(), scale, zero.int()


def _value(level: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    groups = level.unflatten(1, (-1, GROUP)) - zero[..., None]
    return (groups * scale[..., None]).flatten(1)


def _pack(values: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Along `axis`, the first value in the lowest bits of an int32 word."""
    words = values.long().unflatten(axis, (-1, 32 // bits))
    shifts = torch.arange(0, 32, bits).view([-1 if i == axis + 1 else 1 for i in range(3)])
    return (words << shifts).sum(axis + 1).to(torch.uint32).view(torch.int32)


def _gptq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Symmetric, as vLLM serves it, with the biases of zero that some libraries write."""
    level, scale, zero = _levels(weight, 4, symmetric=True)
    parts = {
        "qweight": _pack(level.T, 4, 0),
        "qzeros": _pack(zero.T - 1, 4, 1),
        "scales": scale.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        "bias": torch.zeros(len(weight), dtype=torch.float16),
    }
    return parts, _value(level, scale, zero)


def _gptq_act_order(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Asymmetric, and groups of columns that are not neighbours."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    level, scale, zero = _levels(weight[:, order], 8, symmetric=False)
    back = order.argsort()
    parts = {
        "qweight": _pack(level[:, back].T, 8, 0),
        "qzeros": _pack(zero.T, 8, 1),
        "scales": scale.T.half(),
        "g_idx": (back // GROUP).int(),
    }
    return parts, _value(level, scale, zero)[:, back]


def _awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    level, scale, zero = _levels(weight, 4, symmetric=False)

    def packed(values: torch.Tensor) -> torch.Tensor:
        eights = values.T.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)]
        return _pack(eights.flatten(1), 4, 1)

    parts = {"qweight": packed(level), "qzeros": packed(zero), "scales": scale.T.half()}
    return parts, _value(level, scale, zero)


def _packed(symmetric: bool) -> Quantise:
    """The asymmetric one with groups of columns that are not neighbours, and scales in bf16."""

    def quantise(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        order = torch.arange(weight.shape[1])
        if not symmetric:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(1))
        level, scale, zero = _levels(weight[:, order], 4, symmetric)
        back = order.argsort()
        parts = {
            "weight_packed": _pack(level[:, back], 4, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            scale = scale.bfloat16()
            parts["weight_zero_point"] = _pack(zero, 4, 0)
            parts |= {"weight_g_idx": (back // GROUP).int(), "weight_scale": scale}
        return parts, _value(level, scale.float(), zero)[:, back]

    return quantise


def _int8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    level = (weight / scale).round()
    return {"weight": level.to(torch.int8), "weight_scale": scale}, level * scale


def _fp8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = weight.abs().amax() / 448
    level = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": level, "weight_scale": scale}, level.float() * scale


def _fp8_blocks(weight: torch.Tensor, name: str = "weight_scale_inv") -> tuple[Parts, torch.Tensor]:
    """Square blocks of 48, the last of which are narrower."""
    rows, columns = (torch.arange(size) // 48 for size in weight.shape)
    scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for row in range(len(scale)):
        for column in range(scale.shape[1]):
            block = weight[rows == row][:, columns == column]
            scale[row, column] = block.abs().amax() / 448
    of_each = scale[rows][:, columns]
    level = (weight / of_each).to(torch.float8_e4m3fn)
    return {"weight": level, name: scale}, level.float() * of_each


def _compressed(kind: str, weights: Mapping[str, object], **group: object) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": dict(weights), **group}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "version": "0.17.0",
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]}
_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_GPTQ = {"quant_method": "gptq", "group_size": GROUP, "lm_head": False}

METHODS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "gptq": (_gptq, _GPTQ | {"bits": 4, "sym": True, "desc_act": False}),
    "gptq_v2": (
        _gptq_act_order,
        _GPTQ | {"bits": 8, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
        },
    ),
    "packed": (_packed(True), _compressed("pack-quantized", _GROUPS | {"symmetric": True})),
    "packed_zeros": (
        _packed(False),
        _compressed("pack-quantized", _GROUPS | {"symmetric": False}),
    ),
    "int8": (_int8, _compressed("int-quantized", _CHANNELS, input_activations=_TOKENS)),
    "fp8": (_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8_blocks": (
        _fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 48]},
    ),
    "float_blocks": (
        partial(_fp8_blocks, name="weight_scale"),
        _compressed("float-quantized", _BLOCKS),
    ),
}
