"""The reference model against the dense model and against attention written out by hand."""

import copy
import math

import pytest
import torch
from reference_models import (
    ATTENTION,
    CONTEXT,
    LAYER,
    MADE,
    assert_same_logits,
    bases_for,
    install_kv,
    logits,
    tokens_for,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from offline_compress.factors import ARTEFACTS, LowRankFactors
from offline_compress.families import family_of, head_dim, layer_paths
from offline_compress.kv import KVBases
from offline_compress.reference import CompressedLinear, hold_exactly, install_factors
from offline_compress.reference import install_kv as install_on_layer
from vllm_svd.errors import SvdError
from vllm_svd.format import KVProjection


@pytest.mark.parametrize("modes", [("pre", "pre"), ("post", "post"), ("pre", "post")])
def test_full_rank_projections_change_nothing(dense, statistics, modes):
    model, size = copy.deepcopy(dense), head_dim(dense.config)
    for layer, mode in zip(layer_paths(dense.config), modes, strict=False):
        path = f"{layer}.self_attn"
        bases = bases_for(dense, statistics, mode, size, size, path)
        install_kv(model, path, bases)
    assert_same_logits(logits(model), logits(dense))


def test_first_positions_can_be_held_exactly(dense, statistics):
    model = copy.deepcopy(dense)
    install_kv(model, ATTENTION, bases_for(dense, statistics, "pre", 4, 4))
    hold_exactly(model, 3)
    found, expected = logits(model), logits(dense)
    assert torch.equal(found[:, :3], expected[:, :3])
    assert not torch.isclose(found[:, 3:], expected[:, 3:]).all(-1).any()


def test_rotated_keys_have_no_exact_ones_beside_them(dense, statistics):
    model = copy.deepcopy(dense)
    install_kv(model, ATTENTION, bases_for(dense, statistics, "post", 4, 4))
    with pytest.raises(ValueError, match="rotated"):
        hold_exactly(model, 3)


def windows_of(model):
    """How many tokens each layer sees, itself included."""
    inherited = getattr(model.config, "sliding_window", None)
    layers = [model.get_submodule(f"{layer}.self_attn") for layer in layer_paths(model.config)]
    return [getattr(layer, "sliding_window", inherited) or math.inf for layer in layers]


def attention_by_hand(model, hidden, bases):
    """One attention layer in fp64: a loop over query heads that reads latents from a cache."""
    config, layer = model.config, model.get_submodule(LAYER).double()
    attention, tokens = layer.self_attn, hidden.shape[0]
    groups = config.num_attention_heads // config.num_key_value_heads
    size, window = head_dim(config), windows_of(model)[1]
    scale = getattr(config, "query_pre_attn_scalar", size) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    cos, sin = cos.double(), sin.double()

    def rotate(x):
        return apply_rotary_pos_emb(x[None, None], x[None, None], cos, sin)[0][0, 0]

    def heads(side):
        x = getattr(attention, f"{side}_proj")(hidden).unflatten(-1, (-1, size))
        return getattr(attention, f"{side}_norm", lambda x: x)(x).transpose(0, 1)

    query, key, value = heads("q"), heads("k"), heads("v")
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    visible = (distance >= 0) & (distance < window)
    outputs = []
    for head in range(config.num_attention_heads):
        kv_head = head // groups
        k_down, k_up = bases.k_down[kv_head], bases.k_up[kv_head]
        if bases.config.mode == "pre":
            cached = key[kv_head] @ k_down.T
            scores = rotate(query[head]) @ rotate(cached @ k_up.T).T
        else:
            cached = rotate(key[kv_head]) @ k_down.T
            scores = (rotate(query[head]) @ k_up) @ cached.T
        scores = scores * scale if cap is None else cap * (scores * scale / cap).tanh()
        scores = scores.masked_fill(~visible, -math.inf)
        cached_value = value[kv_head] @ bases.v_down[kv_head].T
        outputs.append(scores.softmax(-1) @ cached_value @ bases.v_up[kv_head].T)
    return attention.o_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("mode", ["pre", "post"])
@torch.no_grad()
def test_reduced_rank_is_attention_over_the_latent_cache(dense, statistics, mode):
    """Also the GQA map, the sliding window, q_norm and k_norm, biases, softmax scale and cap."""
    bases = bases_for(dense, statistics, mode, k_rank=head_dim(dense.config) // 2, v_rank=3)
    model = copy.deepcopy(dense)
    install_kv(model, ATTENTION, bases)
    seen = {}
    model.get_submodule(ATTENTION).register_forward_hook(
        lambda _module, _args, kwargs, output: seen.update(
            hidden=kwargs["hidden_states"], output=output[0]
        ),
        with_kwargs=True,
    )
    logits(model)
    for hidden, output in zip(seen["hidden"], seen["output"], strict=True):
        expected = attention_by_hand(copy.deepcopy(dense), hidden.double(), bases).float()
        assert torch.allclose(output, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_heads_that_share_a_latent_are_what_they_are_alone(dense, statistics, mode):
    """Bases of two heads stacked into those of a group, each in channels of its own."""
    heads = dense.config.num_key_value_heads
    alone = bases_for(dense, statistics, mode, 3, 5)
    shape = alone.config.model_dump() | {"group": heads, "k_rank": 3 * heads, "v_rank": 5 * heads}
    downs = (torch.block_diag(*down)[None] for down in (alone.k_down, alone.v_down))
    ups = (torch.block_diag(*up).view(heads, up.shape[1], -1) for up in (alone.k_up, alone.v_up))
    (k_down, v_down), (k_up, v_up) = downs, ups
    model, grouped = copy.deepcopy(dense), copy.deepcopy(dense)
    install_kv(model, ATTENTION, alone)
    install_kv(grouped, ATTENTION, KVBases(KVProjection(**shape), k_down, k_up, v_down, v_up))
    assert_same_logits(logits(grouped), logits(model))


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_reduced_rank_changes_the_logits(dense, statistics, mode):
    model = copy.deepcopy(dense)
    install_kv(model, ATTENTION, bases_for(dense, statistics, mode, 2, 2))
    scale = float(logits(dense).abs().max())
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-2 * scale


@torch.no_grad()
def test_a_sliding_window_still_hides_the_far_past(dense, statistics):
    windows = windows_of(dense)
    reach = sum(window - 1 for window in windows)
    model = copy.deepcopy(dense)
    for layer in layer_paths(dense.config):
        path = f"{layer}.self_attn"
        bases = bases_for(dense, statistics, "post", 4, 4, path)
        install_kv(model, path, bases)
    tokens = tokens_for(model, samples=1)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % model.config.vocab_size
    difference = (model(tokens).logits - model(changed).logits)[0].abs().amax(-1)
    for position, moved in enumerate(difference):
        if position > reach:
            assert moved == 0
        elif position < min(*windows, CONTEXT):
            assert moved > 0


def factors_of(model, path, rank, dtype=torch.float32):
    weight = model.get_submodule(path).weight.detach().double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    factors = LowRankFactors(A=right[:rank], B=left[:, :rank] * values[:rank])
    return factors.to(dtype)


def test_every_artefact_is_tested_here():
    assert MADE.keys() == ARTEFACTS.keys()


def test_full_rank_factors_change_nothing(dense):
    model = copy.deepcopy(dense)
    for path in family_of(dense.config).linear_paths(dense.config):
        rank = min(dense.get_submodule(path).weight.shape)
        install_factors(model, path, factors_of(dense, path, rank))
    assert_same_logits(logits(model), logits(dense))


@pytest.mark.parametrize("kind", MADE)
def test_factors_are_the_matrix_they_multiply_to(dense, kind):
    """And their correction is a bias beside the layer's own."""
    model, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    for path in family_of(dense.config).linear_paths(dense.config):
        linear = expected.get_submodule(path)
        factors = MADE[kind](linear.weight.detach()).to(torch.float32)
        install_factors(model, path, factors)
        linear.weight.data = factors.dense().float()
        if factors.correction is not None:
            bias = factors.correction + (0 if linear.bias is None else linear.bias.detach())
            linear.bias = torch.nn.Parameter(bias)
        found = model.get_submodule(path)
        assert torch.allclose(found.weight, factors.dense().float(), atol=1e-6)
        assert (found.out_features, found.in_features) == linear.weight.shape
    assert_same_logits(logits(model), logits(expected))


def test_factors_and_projections_fit_a_block_alone(directory, dense, statistics, network_of):
    """The offline stage compresses one block at a time."""
    network, model = network_of(directory), copy.deepcopy(dense)
    bases = bases_for(dense, statistics, "pre", 4, 4)
    block, path = network.block(1), f"{ATTENTION}.q_proj"
    install_factors(block, "self_attn.q_proj", factors_of(dense, path, 6))
    install_on_layer(block, network.source.family, ATTENTION, bases)
    install_factors(model, path, factors_of(dense, path, 6))
    install_kv(model, ATTENTION, bases)
    seen = {}
    model.get_submodule(LAYER).register_forward_hook(
        lambda _m, inputs, output: seen.update(input=inputs[0], output=output)
    )
    logits(model)
    found = network.forward(1, block, seen["input"])
    output = seen["output"]
    assert_same_logits(found, output[0] if isinstance(output, tuple) else output)
    assert isinstance(block.self_attn.q_proj, CompressedLinear)
    other = network.forward(1, network.block(1), seen["input"])  # which stays dense
    assert float((other - found).abs().max()) > 1e-3 * float(other.abs().max())


def test_misfits_are_refused(dense, statistics):
    model, path = copy.deepcopy(dense), f"{ATTENTION}.o_proj"
    bases = bases_for(dense, statistics, "pre", 2, 2)
    narrow = KVProjection(**bases.config.model_dump() | {"num_kv_heads": 1})
    one_head = type(bases)(narrow, *(t[:1] for t in bases.tensors("").values()))
    with pytest.raises(SvdError, match="1 KV heads"):
        install_kv(model, ATTENTION, one_head)
    factors = factors_of(dense, path, 4)
    with pytest.raises(SvdError, match="do not fit"):
        install_factors(model, f"{ATTENTION}.k_proj", factors)
    install_factors(model, path, factors)
    with pytest.raises(SvdError, match="do not fit CompressedLinear"):
        install_factors(model, path, factors)
    install_kv(model, ATTENTION, bases)
    with pytest.raises(SvdError, match="already installed"):
        install_kv(model, ATTENTION, bases)
    with pytest.raises(SvdError, match="before K/V projections"):
        install_factors(model, f"{ATTENTION}.v_proj", factors_of(dense, f"{ATTENTION}.v_proj", 4))
