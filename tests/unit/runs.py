"""Recipes and models that several tests run the whole offline stage on."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from offline_compress.recipe import CompressionRecipe

IDLE = "model.layers.1.mlp.experts.3"


def recipe_for(text, method="svd_llm", kept=0.5, allocator=None, kv=0.5, **calibration):
    """A few short windows on the CPU; without `allocator` the one of the method."""
    return CompressionRecipe.model_validate(
        {
            "weights": {"method": method, "kept": kept, "allocator": allocator},
            "kv": kv if isinstance(kv, dict) else {"kept": kv},
            "calibration": {"text": str(text), "samples": 6, "context": 64, "device": "cpu"}
            | calibration,
            "evaluation": {"samples": 3},
        }
    )


def tensors_of(directory):
    """Every tensor of a checkpoint, by name."""
    found = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def with_weights(directory, out, change):
    """A copy of a model of one shard, `change` applied to its tensors in place."""
    shutil.copytree(directory, out)
    held = load_file(out / "model.safetensors")
    change(held)
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    return out


def with_idle_expert(directory, out):
    """A copy of the tiny mixture in which the router never chooses the expert IDLE."""

    def change(held):
        # What enters the router has a channel that nothing but the embedding writes.
        held["model.embed_tokens.weight"][:, 0] = 1
        for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj"):
            held[f"model.layers.{name}.weight"][0] = 0
        held["model.layers.1.post_attention_layernorm.weight"][0] = 1
        router = held["model.layers.1.mlp.gate.weight"]
        router[3] = 0
        router[3, 0] = -100

    return with_weights(directory, out, change)


def fine_tuned(directory, out):
    """A copy of a model whose matrices, but for the embedding, have moved by a tenth."""
    generator = torch.Generator().manual_seed(11)

    def change(held):
        for name, tensor in held.items():
            if "proj" in name and tensor.ndim == 2:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor += 0.1 * tensor.std() * noise

    return with_weights(directory, out, change)
