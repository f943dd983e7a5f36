"""Every artefact in vLLM's own linear layers, on every rank of a tensor-parallel group."""

import math
from typing import Any

import pytest
import torch
from artefacts import Artefact, artefact, int8, randn, reduced, vector_quantised
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from vllm_svd.errors import CheckpointFormatError, UnsupportedModelError
from vllm_svd.format import LowRank, SvdCheckpointConfig
from vllm_svd.format.delta import Delta
from vllm_svd.quantization import codebook
from vllm_svd.quantization.config import SvdConfig

MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
KINDS = ["low_rank", "int8", "int8_tails", "codebook", "reduced"]


def config(modules: dict[str, Artefact]) -> SvdConfig:
    compressed = {path: made.module for path, made in modules.items() if made.module}
    made = SvdConfig(SvdCheckpointConfig(method="svd", modules=compressed))
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return made


@pytest.fixture
def on_rank(monkeypatch):
    """Make vLLM's layers believe in a rank of a tensor-parallel group."""

    def on_rank(rank: int, size: int) -> None:
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: size)

    on_rank(0, 1)
    return on_rank


def fill(layer: Any, shards: dict[Any, Artefact], skip: str = "", process: bool = True) -> Any:
    """Load as vLLM's AutoWeightsLoader does; shard ids are those of vLLM, None for a single one."""
    tensors = [
        (name, tensor.clone(), shard)
        for shard, made in shards.items()
        for name, tensor in made.parts.items()
        if name != skip
    ]
    for name, tensor, shard in tensors:
        if shard is None:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
        else:
            tensor.shard_id = shard
            assert list(layer.load_weights([(name, tensor)])) == [name]
    if process:
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def replicated(made: Artefact, dtype: torch.dtype = torch.float64, bias: bool = False) -> Any:
    path = f"{MLP}.some_proj"
    return vllm_linear.ReplicatedLinear(
        made.module.in_features,
        made.module.out_features,
        bias=bias,
        params_dtype=dtype,
        quant_config=config({path: made}),
        prefix=path,
        return_bias=False,
    )


def gate_up(gate: Artefact, up: Artefact, **options: Any) -> Any:
    modules = {f"{MLP}.gate_proj": gate, f"{MLP}.up_proj": up}
    m, n = gate.factors[0].shape[0], gate.factors[-1].shape[1]
    return vllm_linear.MergedColumnParallelLinear(
        n,
        [m, m],
        params_dtype=torch.float64,
        quant_config=config(modules),
        prefix=f"{MLP}.gate_up_proj",
        return_bias=False,
        **{"bias": False, **options},
    )


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_error_of_the_plain_expression_at_most(kind, dtype):
    made = artefact(kind, 48, 40, seed=1, dtype=dtype, corrected=True)
    layer = fill(replicated(made, dtype), {None: made})
    x = randn(2, 3, 40, seed=2, dtype=dtype)
    exact, found = made.exact(x), layer(x)
    assert found.dtype == dtype and found.shape == exact.shape
    assert error(found, exact) <= 2 * error(made.plain(x), exact)


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shrink", [2**6, 2**14])
@pytest.mark.parametrize("magnitude", [1.0, 30.0])
def test_int8_sums_are_those_of_the_true_factor(dtype, magnitude, shrink):
    """Sums of whole 8-bit steps exceed fp16 a hundred times; the small scales are below it."""
    made = int8(64, 2048, 3, dtype)
    made.parts["A_int8"] = made.parts["A_int8"].abs()
    made.parts["A_scale"] /= shrink
    made.factors[1] = made.factors[1].abs() / shrink
    layer = fill(replicated(made, dtype), {None: made})
    x = (magnitude * (1 + 0.1 * randn(4, 2048, seed=4))).to(dtype)
    exact, found = made.exact(x), layer(x)
    assert error(found, exact) <= 2 * error(made.plain(x), exact) < 0.1


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("bits", range(1, 13))
def test_every_width_of_an_index(bits):
    """Widths that divide a word and widths whose fields straddle two; dims 1 to 8, odd sizes."""
    dim = 1 + bits % 8
    made = vector_quantised(
        11, 6 * dim + 1, bits, torch.float64, dim, bits, group_rows=4, group_columns=2 * dim
    )
    layer = fill(replicated(made), {None: made})
    x = torch.eye(6 * dim + 1, dtype=torch.float64)
    assert torch.equal(layer(x), made.exact(x))


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("elements", [1, 100, 400, 1 << 20])
def test_tiles_of_any_height(monkeypatch, elements):
    monkeypatch.setattr(codebook, "TILE_ELEMENTS", elements)
    made = artefact("codebook", 23, 20)
    layer = fill(replicated(made), {None: made})
    x = torch.eye(20, dtype=torch.float64)
    assert torch.equal(layer(x), made.exact(x))


SHARDS = [
    ("int8_tails", "codebook", "dense"),
    ("low_rank", "int8", "low_rank"),
    ("codebook", "low_rank", "reduced"),
    ("int8", "int8_tails", "codebook"),
    ("reduced", "dense", "codebook"),
    ("low_rank", "dense", "low_rank"),
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kinds", SHARDS)
def test_fused_qkv_of_mixed_kinds(on_rank, kinds, size):
    """Each rank gets its query heads and the KV heads they read; corrections and biases too."""
    q_heads, kv_heads, head, hidden = 8, 2, 6, 40
    rows = {"q": q_heads * head, "k": kv_heads * head, "v": kv_heads * head}
    shards = {
        shard: artefact(kind, rows[shard], hidden, seed, corrected=kind != "dense" and shard != "k")
        for seed, (shard, kind) in enumerate(zip(rows, kinds, strict=True))
    }
    x, replicas = randn(3, hidden, seed=7), max(1, size // kv_heads)
    bias = {shard: randn(m, seed=8) for shard, m in rows.items()}
    for rank in range(size):
        on_rank(rank, size)
        layer = vllm_linear.QKVParallelLinear(
            hidden,
            head,
            q_heads,
            kv_heads,
            params_dtype=torch.float64,
            quant_config=config({f"{ATTENTION}.{s}_proj": made for s, made in shards.items()}),
            prefix=f"{ATTENTION}.qkv_proj",
            return_bias=False,
        )
        fill(layer, shards)
        expected = []
        for shard, made in shards.items():
            layer.bias.weight_loader(layer.bias, bias[shard], shard)
            groups, group = (size, rank) if shard == "q" else (size // replicas, rank // replicas)
            whole = made.exact(x) + bias[shard]
            expected.append(whole.chunk(groups, dim=1)[group])
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=1))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kinds", [("codebook", "int8_tails"), ("dense", "int8")])
def test_gate_and_up_of_mixed_kinds(on_rank, kinds, size):
    gate, up = (artefact(kind, 20, 12, seed) for seed, kind in enumerate(kinds))
    x = randn(3, 12, seed=7)
    for rank in range(size):
        on_rank(rank, size)
        layer = fill(gate_up(gate, up), {0: gate, 1: up})
        mine = [made.exact(x).chunk(size, dim=1)[rank] for made in (gate, up)]
        torch.testing.assert_close(layer(x), torch.cat(mine, dim=1))


@pytest.mark.usefixtures("on_rank")
def test_pruned_gate_up_and_down():
    """Channels of the hidden layer that both sides dropped are zero between them."""
    gate, up = (reduced(20, 12, seed=3, dtype=torch.float64, out=7, into=5) for _ in range(2))
    down = reduced(12, 20, seed=3, dtype=torch.float64, out=12, into=7)
    x = randn(3, 12, seed=7)
    found = fill(gate_up(gate, up), {0: gate, 1: up})(x)
    torch.testing.assert_close(found, torch.cat([gate.exact(x), up.exact(x)], dim=1))
    assert (found == 0).all(dim=0).sum() == 2 * (20 - 7)
    hidden = found[:, :20] * found[:, 20:]
    torch.testing.assert_close(fill(replicated(down), {None: down})(hidden), down.exact(hidden))


def row_parallel(made: Artefact) -> Any:
    path = f"{MLP}.down_proj"
    return vllm_linear.RowParallelLinear(
        made.module.in_features,
        made.module.out_features,
        bias=False,
        params_dtype=torch.float64,
        reduce_results=False,
        quant_config=config({path: made}),
        prefix=path,
        return_bias=False,
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["low_rank", "int8", "int8_tails", "codebook"])
def test_row_parallel_sums_to_the_whole_with_one_correction(on_rank, kind, size):
    """Ranks are cut within vectors, words, strips and tails."""
    made = artefact(kind, 14, 40, seed=5, corrected=True)
    x = randn(3, 40, seed=6)
    total = torch.zeros(3, 14, dtype=torch.float64)
    for rank in range(size):
        on_rank(rank, size)
        total += fill(row_parallel(made), {None: made})(x.chunk(size, dim=1)[rank])
    torch.testing.assert_close(total, made.exact(x))


def test_a_replicated_layer_keeps_all_on_every_rank(on_rank):
    """vLLM's ReplicatedLinear carries the global rank; the correction is every rank's."""
    on_rank(1, 2)
    for kind in KINDS:
        made = artefact(kind, 14, 20, corrected=True)
        x = randn(3, 20, seed=6)
        torch.testing.assert_close(fill(replicated(made), {None: made})(x), made.exact(x))


def test_only_pruned_axes_refuse_to_be_split(on_rank):
    on_rank(1, 2)
    inputs = reduced(20, 12, seed=0, dtype=torch.float64, out=20, into=5)
    outputs = reduced(20, 12, seed=0, dtype=torch.float64, out=8, into=12)
    x = randn(3, 12, seed=7)
    layer = fill(gate_up(inputs, inputs), {0: inputs, 1: inputs})
    torch.testing.assert_close(layer(x)[:, :10], inputs.exact(x)[:, 10:])
    layer = fill(row_parallel(outputs), {None: outputs})
    padded = torch.cat([torch.zeros(3, 6), x[:, 6:]], dim=1)
    torch.testing.assert_close(layer(x[:, 6:]), outputs.exact(padded))
    with pytest.raises(UnsupportedModelError, match="lost some of its outputs") as refused:
        gate_up(inputs, outputs)
    assert "gate_up_proj shard 1" in str(refused.value)
    assert "--tensor-parallel-size 1" in str(refused.value)
    with pytest.raises(UnsupportedModelError, match="lost some of its inputs"):
        row_parallel(inputs)


PARTS = [
    (kind, name)
    for kind in KINDS
    for name in artefact(kind, 16, 12, dtype=torch.float32, corrected=True).parts
] + [("dense", "weight")]


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_tensor_that_never_came_is_named(kind, name):
    made = artefact(kind, 16, 12, corrected=kind != "dense")
    other = artefact("int8" if "codebook" in kind else "codebook", 16, 12)
    layer = fill(gate_up(other, made), {0: other, 1: made}, skip=name, process=False)
    with pytest.raises(CheckpointFormatError) as refused:
        layer.quant_method.process_weights_after_loading(layer)
    assert refused.value.problems == (f"shard 1: {name} was not loaded completely, or holds NaN",)


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_vllms_random_weights_pass(kind):
    """--load-format dummy, which leaves integers as they are."""
    made = artefact(kind, 16, 12, dtype=torch.float32, corrected=True)
    layer = replicated(made, torch.float32)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer(torch.randn(3, 12)).isfinite().all()


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_refused(kind):
    made = artefact(kind, 16, 12, corrected=True)
    for name, tensor in made.parts.items():
        wrong_type = tensor.int() if tensor.is_floating_point() else tensor.float()
        for wrong in (tensor[1:], torch.cat([tensor, tensor]), wrong_type):
            layer = replicated(made)
            parameter = getattr(layer, name)
            with pytest.raises(CheckpointFormatError, match=f"shard 0: {name} is"):
                parameter.weight_loader(parameter, wrong)


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("beyond", [-1, 12])
def test_indices_beyond_the_matrix_are_refused(name, beyond):
    made = reduced(12, 12, seed=0, dtype=torch.float64, out=5, into=5)
    made.parts[name][-1] = beyond
    with pytest.raises(CheckpointFormatError, match=f"{name} holds indices outside 0 to 11"):
        fill(replicated(made), {None: made})


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_any_number_of_tokens(kind):
    made = artefact(kind, 16, 12, corrected=True)
    layer = fill(replicated(made), {None: made})
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        del example
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: layer.quant_method.apply(layer, x), fullgraph=True, dynamic=True, backend=backend
    )
    for tokens in (3, 5, 17):
        x = randn(tokens, 12, seed=tokens)
        torch.testing.assert_close(compiled(x), made.exact(x))
    assert len(graphs) == 1


@pytest.mark.usefixtures("on_rank")
@pytest.mark.parametrize("kind", ["int8", "int8_tails", "codebook", "reduced"])
def test_nothing_dense_is_kept(kind):
    """Bytes in memory are those on disk."""
    made = artefact(kind, 64, 48, dtype=torch.bfloat16, corrected=True)
    layer = fill(replicated(made, torch.bfloat16), {None: made})
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert held == made.module.bytes(2)
    assert math.prod(layer.weight.shape) == 0


def test_deltas_and_compressed_experts_are_refused_at_once():
    expert = LowRank(out_features=8, in_features=8, rank=2)
    delta = Delta(out_features=8, in_features=8, rank=2, kept_u=4, kept_v=4)
    modules = {f"{MLP}.experts.3.up_proj": expert, f"{ATTENTION}.o_proj": delta}
    checkpoint = SvdCheckpointConfig.model_construct(modules=modules, kv={})
    with pytest.raises(UnsupportedModelError) as refused:
        SvdConfig(checkpoint)
    for named in ("kind 'delta'", f"{MLP}.experts.3.up_proj", "offline-compress restore"):
        assert named in str(refused.value)


def test_a_mixture_with_dense_experts_keeps_vllms_method():
    made = config({f"{ATTENTION}.o_proj": artefact("codebook", 8, 8)})
    assert made.get_quant_method(object.__new__(RoutedExperts), f"{MLP}.experts") is None


def test_a_compressed_head_is_refused():
    made = config({"lm_head": artefact("low_rank", 8, 8)})
    with pytest.raises(UnsupportedModelError, match="lm_head is an embedding"):
        made.get_quant_method(object.__new__(ParallelLMHead), "lm_head")


def test_a_matrix_fused_on_disk_is_served_whole_or_not_at_all(on_rank):
    made = artefact("codebook", 20, 12)
    quant_config = config({f"{MLP}.gate_up_proj": made})
    quant_config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
    options = {"params_dtype": torch.float64, "prefix": f"{MLP}.gate_up_proj", "bias": False}
    for size in (1, 2):
        on_rank(0, size)
        if size == 2:
            with pytest.raises(UnsupportedModelError, match="--tensor-parallel-size 1"):
                vllm_linear.MergedColumnParallelLinear(
                    12, [10, 10], quant_config=quant_config, **options
                )
        else:
            layer = vllm_linear.MergedColumnParallelLinear(
                12, [10, 10], quant_config=quant_config, return_bias=False, **options
            )
            fill(layer, {None: made})
            x = randn(3, 12, seed=7)
            torch.testing.assert_close(layer(x), made.exact(x))
