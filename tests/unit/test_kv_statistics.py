"""K/V statistics against queries, keys and values computed by hand."""

from functools import partial

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.llama.modeling_llama import rotate_half

from offline_compress.calibration import Streams
from offline_compress.families import head_dim, layer_paths
from offline_compress.kv import collect
from offline_compress.kv.rope import Rope
from offline_compress.reference import load
from vllm_svd.errors import SvdError

FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "qwen3", "qwen3_moe")
CONTEXT = 64


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def model(directory):
    """The whole model at once, in plain transformers."""
    return load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def network(directory, network_of):
    return network_of(directory)


@pytest.fixture(scope="module")
def windows(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (5, CONTEXT), generator=generator)


def attention_paths(model):
    return [f"{layer}.self_attn" for layer in layer_paths(model.config)]


def rows_of(streams: Streams) -> list[slice]:
    return list(streams.calibrating())


@pytest.fixture(scope="module")
def collected(network, windows, kv_statistics):
    return partial(kv_statistics, network, windows)


@torch.no_grad()
def rotated_by_the_model(model, windows):
    """Query, key, value [samples, heads, tokens, d] that the attention function receives."""
    seen, before = {}, model.config._attn_implementation
    attend = AttentionInterface().get(before, eager_attention_forward)

    def capture(module, query, key, value, attention_mask, **kwargs):
        seen[module] = (query.double(), key.double(), value.double())
        return attend(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("capture", capture)
    AttentionMaskInterface.register("capture", AttentionMaskInterface()[before])
    model.set_attn_implementation("capture")
    model(windows)
    model.set_attn_implementation(before)
    return [seen[model.get_submodule(path)] for path in attention_paths(model)]


@torch.no_grad()
def before_rope(model, windows):
    """Query and key [samples, heads, tokens, d] from the hidden states and the module's weights."""
    hidden = model(windows, output_hidden_states=True).hidden_states
    size = head_dim(model.config)
    pairs = []
    for path, states in zip(layer_paths(model.config), hidden, strict=False):
        layer = model.get_submodule(path)
        states = layer.input_layernorm(states)
        pair = []
        for side in ("q", "k"):
            x = getattr(layer.self_attn, f"{side}_proj")(states).unflatten(-1, (-1, size))
            norm = getattr(layer.self_attn, f"{side}_norm", lambda x: x)
            pair.append(norm(x).transpose(1, 2).double())
        pairs.append(pair)
    return pairs


def moments(x):
    """E[x x^T] per head [heads, d, d], token by token, of x [samples, heads, tokens, d]."""
    return torch.einsum("bhti,bhtj->hij", x, x) / (x.shape[0] * x.shape[2])


def read_by(model, per_query_head):
    """Sum over the query heads that read each KV head."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    total = torch.zeros(model.config.num_key_value_heads, *per_query_head.shape[1:]).double()
    for head, moment in enumerate(per_query_head):
        total[head // groups] += moment
    return total


def rotation(model, offset):
    """R_D [d, d] from the model's own angles."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[offset]]))
    identity = torch.eye(head_dim(model.config))
    return (identity * cos[0] + rotate_half(identity) * sin[0]).T.double()


def assert_close(found, expected):
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_post_moments_are_those_of_the_rotated_query_and_key(model, windows, collected):
    statistics = collected("post")
    for path, (query, key, value) in zip(
        attention_paths(model), rotated_by_the_model(model, windows), strict=True
    ):
        assert statistics[path].tokens == windows.numel()
        assert_close(statistics[path].key_moment, moments(key))
        assert_close(statistics[path].query_metric, read_by(model, moments(query)))
        assert_close(statistics[path].value_moment, moments(value))


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_moments_of_a_group_are_joint_and_its_readers_are_not(model, windows, collected, mode):
    alone, together = collected(mode), collected(mode, group=2)
    size = head_dim(model.config)
    for path, (_, key, value) in zip(
        attention_paths(model), rotated_by_the_model(model, windows), strict=True
    ):
        found = together[path]
        joint = value.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        assert_close(found.value_moment, moments(joint))
        if mode == "post":
            joint = key.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
            assert_close(found.key_moment, moments(joint))
        for name in ("key_moment", "query_metric", "value_moment", "output_metric"):
            of_group, of_head = getattr(found, name), getattr(alone[path], name)
            for head, matrix in enumerate(of_head):
                part = slice(head % 2 * size, (head % 2 + 1) * size)
                torch.testing.assert_close(of_group[head // 2, part, part], matrix)
            if "metric" in name:
                assert not of_group[:, :size, size:].any() and not of_group[:, size:, :size].any()


def test_pre_moments_are_those_before_rope_read_at_every_offset(model, windows, collected):
    inherited, statistics = getattr(model.config, "sliding_window", None), collected("pre")
    for path, (query, key) in zip(attention_paths(model), before_rope(model, windows), strict=True):
        window = getattr(model.get_submodule(path), "sliding_window", inherited) or CONTEXT
        offsets = [offset for offset in (0, 1, 2, 4, 8, 16, 32) if offset < window]
        assert_close(statistics[path].key_moment, moments(key))
        query_moment = read_by(model, moments(query))
        turns = [rotation(model, offset) for offset in offsets]
        expected = sum(turn @ query_moment @ turn.T for turn in turns) / len(turns)
        assert_close(statistics[path].query_metric, expected)


def test_output_metric_weighs_the_value_by_its_columns_of_o_proj(model, collected):
    size = head_dim(model.config)
    for path, statistics in collected("pre").items():
        columns = model.get_submodule(path).o_proj.weight.detach().double().split(size, dim=1)
        per_head = torch.stack([column.T @ column for column in columns])
        assert_close(statistics.output_metric, read_by(model, per_head))


def test_the_block_is_measured_as_it_is_compressed(network, windows, streams_of):
    """The moments are those of the block that is given, and of the hidden states that are."""
    streams = streams_of(network, windows)
    dense, halved = network.block(0), network.block(0)
    for weight in (halved.self_attn.v_proj.weight, halved.self_attn.o_proj.weight):
        weight.mul_(0.5)  # exact
    if halved.self_attn.v_proj.bias is not None:
        halved.self_attn.v_proj.bias.mul_(0.5)
    before, after = (
        collect(network, 0, block, streams.dense, rows_of(streams), streams, "pre")
        for block in (dense, halved)
    )
    assert torch.equal(after.value_moment, before.value_moment / 4)
    assert torch.equal(after.output_metric, before.output_metric / 4)
    assert torch.equal(after.key_moment, before.key_moment)
    first = collect(network, 0, dense, streams.dense, [slice(0, 2)], streams, "pre")
    assert first.tokens == 2 * CONTEXT
    assert not torch.equal(first.key_moment, before.key_moment)


def test_batching_changes_nothing(collected):
    whole, parts = collected("post", batch=5), collected("post", batch=2)
    for path in whole:
        assert_close(parts[path].key_moment, whole[path].key_moment)
        assert_close(parts[path].query_metric, whole[path].query_metric)


def test_activations_that_are_not_finite_name_the_layer_and_no_hook_stays(
    network, windows, streams_of
):
    streams, block = streams_of(network, windows), network.block(1)
    collect(network, 1, block, streams.dense, rows_of(streams), streams, "pre")
    block.self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(SvdError, match=r"model\.layers\.1\.self_attn: the value"):
        collect(network, 1, block, streams.dense, rows_of(streams), streams, "pre")
    assert not any(module._forward_hooks for module in block.modules())


def test_no_windows_are_refused(network, windows, streams_of):
    streams = streams_of(network, windows)
    with pytest.raises(SvdError, match=r"model\.layers\.0\.self_attn: no tokens"):
        collect(network, 0, network.block(0), streams.dense, [], streams, "pre")


def scaled_model(rope_parameters):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters=rope_parameters,
    )
    return LlamaForCausalLM(config)


SCALINGS = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("parameters", SCALINGS, ids=lambda p: p["rope_type"])
def test_score_error_before_rope_is_the_trace_formula(parameters):
    """E over pairs and offsets of the squared error of (R_m q)^T (R_n k), m - n in the offsets."""
    generator = torch.Generator().manual_seed(3)
    rope = Rope(scaled_model(parameters).model.rotary_emb)
    # off-centre, so that the sign of the rotation matters
    query, key = torch.randn(2, 40, 16, generator=generator).double() + torch.arange(16) / 4
    projector = torch.randn(16, 16, generator=generator).double()
    error = torch.eye(16).double() - projector
    offsets, start = [0, 1, 2, 4, 8, 16, 32], 5
    rotated_error = rope.rotate((key @ error.T)[:, None], torch.tensor([start]))[:, 0]
    squares = []
    for offset in offsets:
        rotated_query = rope.rotate(query[:, None], torch.tensor([start + offset]))[:, 0]
        squares.append((rotated_query @ rotated_error.T).square().mean())
    measured = torch.stack(squares).mean()

    query_moment, key_moment = query.T @ query / 40, key.T @ key / 40
    metric = rope.read_metric(query_moment[None], 32)[0]
    # an attention factor (yarn) multiplies query and key alike; the metric carries one of the two
    factor = float(rope.module.attention_scaling) ** 2
    predicted = factor * torch.trace(metric @ error @ key_moment @ error.T)
    assert float(predicted) == pytest.approx(float(measured), rel=1e-5)

    opposite = torch.zeros_like(metric)
    for offset in offsets:
        turned = rope.rotate(query[:, None], torch.tensor([-offset]))[:, 0]
        opposite += turned.T @ turned / 40 / len(offsets)
    wrong = factor * torch.trace(opposite @ error @ key_moment @ error.T)
    assert float(wrong) != pytest.approx(float(measured), rel=1e-2)
