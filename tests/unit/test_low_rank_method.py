"""The linear method on every rank of a tensor-parallel group, without an engine."""

import inspect
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from vllm_svd.compat import BaseKVCacheMethod, LinearMethodBase, QuantizationConfig
from vllm_svd.errors import CheckpointFormatError, UnsupportedModelError
from vllm_svd.format import LowRank, SvdCheckpointConfig
from vllm_svd.kernels.products import emulated
from vllm_svd.quantization.config import SvdConfig
from vllm_svd.quantization.latent_kv import LatentKVMethod
from vllm_svd.quantization.linear import ShardedLinearMethod
from vllm_svd.quantization.prepacked import LowRankProducts

HEAD, HIDDEN = 4, 12
Q_HEADS, KV_HEADS = 8, 2


class Layer(torch.nn.Module):
    """What vLLM's linear layers tell their method."""

    def __init__(self, tp_rank: int, tp_size: int, input_size: int, replicas: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.input_size = tp_rank, tp_size, input_size
        self.num_kv_head_replicas = replicas
        self.prefix = "model.layers.0.some_proj"


def made(
    method: ShardedLinearMethod,
    layer: Layer,
    n_local: int,
    rows: list[int],
    ranks: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Layer:
    """The layer with its parameters; `ranks` share out its rows."""
    method.create_weights(layer, n_local, rows, layer.input_size, ranks * sum(rows), dtype)
    return layer


def load(layer: Layer, name: str, tensor: torch.Tensor, *shard: Any) -> None:
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, tensor, *shard)


def factors(m: int, n: int, r: int) -> tuple[LowRank, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(m * n + r)
    A = torch.randn(r, n, generator=g, dtype=torch.float64)
    B = torch.randn(m, r, generator=g, dtype=torch.float64)
    return LowRank(out_features=m, in_features=n, rank=r), A, B


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dense", [None, "q", "k"])
def test_fused_qkv_with_sharded_and_replicated_heads(tp_size, dense):
    """Each rank gets its query heads and the KV heads they read, at unequal ranks."""
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    rows = {"q": Q_HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    parts = {s: factors(m, HIDDEN, r) for (s, m), r in zip(rows.items(), (5, 3, 7), strict=True)}
    configs = [None if s == dense else parts[s][0] for s in rows]
    replicas = max(1, tp_size // KV_HEADS)
    for rank in range(tp_size):
        method = ShardedLinearMethod(configs)
        kv_rows = max(1, KV_HEADS // tp_size) * HEAD
        local = [Q_HEADS // tp_size * HEAD, kv_rows, kv_rows]
        layer = made(method, Layer(rank, tp_size, HIDDEN, replicas), HIDDEN, local, tp_size)
        for s, (_, A, B) in parts.items():
            if s == dense:
                load(layer, "weight", B @ A, s)
            else:
                load(layer, "A", A, s)
                load(layer, "B", B, s)
        method.process_weights_after_loading(layer)
        expected = []
        for s, (_, A, B) in parts.items():
            group = rank if s == "q" else rank // replicas
            width = local[0] if s == "q" else kv_rows
            expected.append((x @ A.T @ B.T)[:, group * width : (group + 1) * width])
        torch.testing.assert_close(method.apply(layer, x), torch.cat(expected, dim=1))


@pytest.mark.parametrize("tp_size", [1, 3])
def test_row_parallel_sums_to_the_whole(tp_size):
    config, A, B = factors(8, HIDDEN, 5)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    width = HIDDEN // tp_size
    total = torch.zeros(3, 8, dtype=torch.float64)
    for rank in range(tp_size):
        method = ShardedLinearMethod([config])
        layer = made(method, Layer(rank, tp_size, HIDDEN), width, [8])
        load(layer, "A", A)
        load(layer, "B", B)
        total += method.apply(layer, x[:, rank * width : (rank + 1) * width])
    torch.testing.assert_close(total, x @ A.T @ B.T)


HALVES = [
    dtype for dtype in (torch.bfloat16, torch.float16) if not emulated(torch.empty(0).to(dtype))
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (40,), (2, 3)], ids=str)
def test_factors_that_are_reordered_for_a_cpu(dtype, shape):
    """Of ranks whose sum is odd: rows of a shard's latents lie apart by that."""
    width, sizes, ranks = 96, (64, 32, 32), (32, 17, 24)
    parts = [factors(m, width, r) for m, r in zip(sizes, ranks, strict=True)]
    method = ShardedLinearMethod([config for config, _, _ in parts])
    layer = made(method, Layer(0, 1, width), width, list(sizes), dtype=dtype)
    plain, exact, x = [], [], torch.randn(*shape, width).to(dtype)
    for shard, (_, *pair) in zip("qkv", parts, strict=True):
        A, B = (factor.mul(0.1).to(dtype) for factor in pair)
        load(layer, "A", A, shard)
        load(layer, "B", B, shard)
        plain.append(x @ A.T @ B.T)
        exact.append(x.double() @ A.T.double() @ B.T.double())
    method.process_weights_after_loading(layer)
    assert isinstance(layer.svd_products, LowRankProducts)
    assert layer.A.numel() == layer.B.numel() == 0
    found, exact = method.apply(layer, x), torch.cat(exact, dim=-1)
    assert found.dtype == dtype and found.shape == exact.shape
    error = (torch.cat(plain, dim=-1).double() - exact).norm()
    assert (found.double() - exact).norm() <= 2 * error
    method.process_weights_after_loading(layer)  # as vLLM does when other layers were loaded
    assert torch.equal(method.apply(layer, x), found)
    with pytest.raises(UnsupportedModelError, match="was loaded again"):
        load(layer, "A", parts[0][1], "q")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_factors_are_loaded_again_by_vllm(dtype):
    """Layer by layer, as reload_weights does: reordered or not, only the new ones count."""
    width, rows, rank = 96, 64, 32
    config, *first = factors(rows, width, rank)
    method = ShardedLinearMethod([config])
    layer = made(method, Layer(0, 1, width), width, [rows], dtype=dtype)
    layer.quant_method = method
    x = torch.randn(3, width).to(dtype)
    record_metadata_for_reloading(layer)
    for name, factor in zip("AB", first, strict=True):
        load(layer, name, factor.mul(0.1).to(dtype))
    method.process_weights_after_loading(layer)
    before = method.apply(layer, x)
    initialize_layerwise_reload(layer)
    for name, factor in zip("AB", first, strict=True):
        load(layer, name, factor.mul(-0.2 if name == "A" else 0.1).to(dtype))
    finalize_layerwise_reload(layer, None)
    assert torch.equal(method.apply(layer, x), -2 * before)


def test_replicated_layers_keep_every_row():
    """vLLM's ReplicatedLinear carries the global rank."""
    config, A, B = factors(8, HIDDEN, 5)
    method = ShardedLinearMethod([config])
    layer = made(method, Layer(1, 2, HIDDEN), HIDDEN, [8])
    load(layer, "A", A)
    load(layer, "B", B)
    x, bias = torch.randn(2, HIDDEN, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(method.apply(layer, x, bias), x @ A.T @ B.T + bias)


def test_a_tensor_that_never_came_is_named():
    config, A, _ = factors(8, HIDDEN, 5)
    method = ShardedLinearMethod([config])
    layer = made(method, Layer(0, 1, HIDDEN), HIDDEN, [8])
    load(layer, "A", A)
    with pytest.raises(CheckpointFormatError, match="B was not loaded completely"):
        method.process_weights_after_loading(layer)


def test_sizes_that_are_not_the_layers_are_refused():
    config, _, _ = factors(8, HIDDEN, 5)
    with pytest.raises(CheckpointFormatError, match="shard 0 has 6 rows"):
        made(ShardedLinearMethod([config]), Layer(0, 1, HIDDEN), HIDDEN, [6])
    with pytest.raises(CheckpointFormatError, match="shard 0 has 10 columns"):
        made(ShardedLinearMethod([config]), Layer(0, 1, 10), 10, [8])


@pytest.mark.parametrize(
    ("name", "shape"), [("A", (4, HIDDEN)), ("B", (8, 4)), ("weight", (8, 12))]
)
def test_tensors_that_do_not_fit_are_refused(name, shape):
    config, _, _ = factors(8, HIDDEN, 5)
    layer = made(ShardedLinearMethod([config]), Layer(0, 1, HIDDEN), HIDDEN, [8])
    with pytest.raises(CheckpointFormatError, match=f"{name}"):
        load(layer, name, torch.zeros(shape, dtype=torch.float64))


def test_quantization_svd_on_a_dense_model_is_explained():
    from vllm_svd.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match="drop --quantization"):
        SvdConfig()


@pytest.mark.parametrize(
    ("ours", "theirs", "methods"),
    [
        (ShardedLinearMethod, LinearMethodBase, ["apply", "create_weights"]),
        (LatentKVMethod, BaseKVCacheMethod, ["create_weights", "process_weights_after_loading"]),
        (SvdConfig, QuantizationConfig, ["get_quant_method", "maybe_update_config", "from_config"]),
    ],
)
def test_overrides_take_what_vllm_passes(ours, theirs, methods):
    """mypy does not see vLLM's types; the parameter names must match all the same."""
    for name in methods:
        given = list(inspect.signature(getattr(theirs, name)).parameters)
        taken = list(inspect.signature(getattr(ours, name)).parameters)
        assert taken == given, name


@pytest.mark.parametrize(
    ("fused", "parts"),
    [("gate_up_proj", ["gate_proj", "up_proj"]), ("qkv_proj", ["q_proj", "k_proj", "v_proj"])],
)
def test_fused_layers_that_the_model_names_too_late_are_found(fused, parts):
    """Qwen3-MoE adds gate_up_proj to its mapping after vLLM has copied it."""
    modules = {f"model.layers.0.{name}": factors(8, HIDDEN, 2)[0] for name in parts}
    quant_config = SvdConfig(SvdCheckpointConfig(method="svd", modules=modules))
    quant_config.packed_modules_mapping = {}
    layer = object.__new__(MergedColumnParallelLinear)
    method = quant_config.get_quant_method(layer, f"model.layers.0.{fused}")
    assert isinstance(method, ShardedLinearMethod)
    assert method.modules == list(modules.values())
