"""A transformer block of random weights that MoDeGPT reduces, and the sizes it may be given."""

import pytest
import torch
from grams import normal
from torch.nn.functional import silu

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.methods.block import Block, Layer
from vllm_svd.format import Reduced

HIDDEN, READERS, HEADS, SIZE, WIDTH, TOKENS = 24, 6, 2, 8, 20, 90
Q, K, V, O = (f"l.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"l.mlp.{name}_proj" for name in ("gate", "up", "down"))
ATTENTION, MLP = (Q, K, V, O), (GATE, UP, DOWN)


def layer_of(qk_norm=False, hidden=HIDDEN, width=WIDTH, size=SIZE, item_bytes=2, experts=0):
    shapes = {
        Q: (READERS * size, hidden),
        K: (HEADS * size, hidden),
        V: (HEADS * size, hidden),
        O: (hidden, READERS * size),
    }
    for mlp in [f"l.mlp.experts.{index}" for index in range(experts)] or ["l.mlp"]:
        shapes |= {f"{mlp}.{name}_proj": (width, hidden) for name in ("gate", "up")}
        shapes |= {f"{mlp}.down_proj": (hidden, width)}
    return Layer("l", shapes, READERS, HEADS, size, item_bytes, qk_norm)


def normed(x, layer):
    """RMS norm of every head, as qk-norm does before RoPE."""
    heads = x.unflatten(-1, (-1, layer.head_dim))
    return heads / heads.square().mean(-1, keepdim=True).sqrt() if layer.qk_norm else heads


def block_of(layer, x, biased=False, scale=1.0, dtype=torch.float64):
    """Random weights, and the statistics of the inputs x [tokens, hidden]."""
    weights = {
        path: (scale * normal(*shape, seed=seed + 1)).to(dtype)
        for seed, (path, shape) in enumerate(layer.shapes.items())
    }
    biases = {
        path: normal(shape[0], seed=70 + seed) if biased else None
        for seed, (path, shape) in enumerate(layer.shapes.items())
    }
    block = Block(layer, weights, biases, {})
    gram = x.T @ x / len(x)
    seen = {path: LayerStatistics(gram) for path in layer.shapes}
    for path in layer.shapes:
        if path.endswith("down_proj"):
            z = gated(block, x, path.removesuffix("down_proj"))
            seen[path] = LayerStatistics(z.T @ z / len(z))
    energies = [normed(dense(block, path, x), layer).square().mean(0) for path in (Q, K)]
    return Block(layer, weights, biases, seen, None, *energies)


def dense(block, path, x):
    return torch.nn.functional.linear(x, block.weights[path].double(), block.biases[path])


def gated(block, x, mlp="l.mlp."):
    return silu(dense(block, f"{mlp}gate_proj", x)) * dense(block, f"{mlp}up_proj", x)


def sized(layer, rank, kept=WIDTH):
    """The artefacts of these sizes, of the full ones too."""
    found = {}
    for path, (rows, columns) in layer.shapes.items():
        heads = {Q: READERS, K: HEADS, V: HEADS, O: READERS}.get(path)
        lines = kept if heads is None else heads * rank
        by_columns = path in (O, DOWN)
        found[path] = Reduced(
            out_features=rows,
            in_features=columns,
            kept_out=rows if by_columns else lines,
            kept_in=lines if by_columns else columns,
        )
    if layer.qk_norm:
        del found[Q], found[K]
    return found


def shifting(tokens=TOKENS, width=HIDDEN, seed=40):
    """Inputs of a decaying, rotated spectrum and of a mean that is not zero."""
    rotation, _ = torch.linalg.qr(normal(width, width, seed=seed))
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    return normal(tokens, width, seed=seed + 1) * spectrum @ rotation + normal(width, seed=seed + 2)


variants = pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
norms = pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
