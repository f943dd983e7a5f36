"""The reference model against the dense model and against attention written out by hand."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from offline_compress.families import family_of, head_dim, layer_paths
from offline_compress.kv import collect, project
from offline_compress.methods.factors import LowRankFactors
from offline_compress.reference import describe, install_factors, install_kv, load
from vllm_svd.errors import CheckpointFormatError, SvdError
from vllm_svd.format import (
    KVProjection,
    Manifest,
    ShardRecord,
    SvdCheckpointConfig,
    TensorRecord,
    sha256,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CONTEXT = 48
LAYER, ATTENTION = "model.layers.1", "model.layers.1.self_attn"


def tokens_for(model, samples=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (samples, CONTEXT), generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tiny_checkpoint):
    """A tiny model whose every parameter, bias and norm is random enough to matter."""
    model = load(tiny_checkpoint(request.param), "cpu", torch.float32)
    if request.param == "mistral":
        model.config.sliding_window = 16  # every layer of Mistral slides
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = parameter.data * (parameter.ndim == 1) + spread * noise
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def statistics(dense):
    paths = [f"{layer}.self_attn" for layer in layer_paths(dense.config)]
    windows = tokens_for(dense, samples=4)
    return {
        mode: collect(dense, family_of(dense.config), windows, dict.fromkeys(paths, mode), 4)
        for mode in ("pre", "post")
    }


def bases_for(model, statistics, mode, k_rank, v_rank, path=ATTENTION):
    config = KVProjection(
        mode=mode,
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=head_dim(model.config),
        k_rank=k_rank,
        v_rank=v_rank,
    )
    return project(statistics[mode][path], config)


@torch.no_grad()
def logits(model):
    return model(tokens_for(model)).logits


def assert_same_logits(found, expected):
    """Within fp32: ~100 additions of up to 1e-7 each in relative terms, over a few layers."""
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("modes", [("pre", "pre"), ("post", "post"), ("pre", "post")])
def test_full_rank_projections_change_nothing(dense, statistics, modes):
    model, size = copy.deepcopy(dense), head_dim(dense.config)
    for layer, mode in zip(layer_paths(dense.config), modes, strict=False):
        path = f"{layer}.self_attn"
        bases = bases_for(dense, statistics, mode, size, size, path)
        install_kv(model, family_of(dense.config), path, bases)
    assert_same_logits(logits(model), logits(dense))


def attention_by_hand(model, hidden, bases):
    """One attention layer in fp64: a loop over query heads that reads latents from a cache."""
    config, layer = model.config, model.get_submodule(LAYER).double()
    attention, tokens = layer.self_attn, hidden.shape[0]
    groups = config.num_attention_heads // config.num_key_value_heads
    size, window = head_dim(config), getattr(config, "sliding_window", None) or tokens
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
        scores = (scores / math.sqrt(size)).masked_fill(~visible, -math.inf)
        cached_value = value[kv_head] @ bases.v_down[kv_head].T
        outputs.append(scores.softmax(-1) @ cached_value @ bases.v_up[kv_head].T)
    return attention.o_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("mode", ["pre", "post"])
@torch.no_grad()
def test_reduced_rank_is_attention_over_the_latent_cache(dense, statistics, mode):
    """Also the GQA map, the sliding window, q_norm and k_norm, biases and the softmax scale."""
    bases = bases_for(dense, statistics, mode, k_rank=head_dim(dense.config) // 2, v_rank=3)
    model = copy.deepcopy(dense)
    install_kv(model, family_of(dense.config), ATTENTION, bases)
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
def test_reduced_rank_changes_the_logits(dense, statistics, mode):
    model = copy.deepcopy(dense)
    install_kv(model, family_of(dense.config), ATTENTION, bases_for(dense, statistics, mode, 2, 2))
    scale = float(logits(dense).abs().max())
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-2 * scale


@torch.no_grad()
def test_a_sliding_window_still_hides_the_far_past(dense, statistics):
    window = getattr(dense.config, "sliding_window", None) or math.inf
    reach = dense.config.num_hidden_layers * (window - 1)
    model = copy.deepcopy(dense)
    for layer in layer_paths(dense.config):
        path = f"{layer}.self_attn"
        bases = bases_for(dense, statistics, "post", 4, 4, path)
        install_kv(model, family_of(dense.config), path, bases)
    tokens = tokens_for(model, samples=1)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % model.config.vocab_size
    difference = (model(tokens).logits - model(changed).logits)[0].abs().amax(-1)
    for position, moved in enumerate(difference):
        if position > reach:
            assert moved == 0
        elif position < min(window, CONTEXT):
            assert moved > 0


def factors_of(model, path, rank, dtype=torch.float32):
    weight = model.get_submodule(path).weight.detach().double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    factors = LowRankFactors(A=right[:rank], B=left[:, :rank] * values[:rank])
    return factors.to(dtype)


def test_full_rank_factors_change_nothing(dense):
    model = copy.deepcopy(dense)
    for path in family_of(dense.config).linear_paths(dense.config):
        rank = min(dense.get_submodule(path).weight.shape)
        install_factors(model, path, factors_of(dense, path, rank))
    assert_same_logits(logits(model), logits(dense))


def test_factors_are_the_matrix_they_multiply_to(dense):
    model, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    for path in family_of(dense.config).linear_paths(dense.config):
        factors = factors_of(dense, path, 5)
        install_factors(model, path, factors)
        expected.get_submodule(path).weight.data = factors.dense().float()
        assert torch.allclose(model.get_submodule(path).weight, factors.dense().float(), atol=1e-6)
    assert_same_logits(logits(model), logits(expected))


def test_misfits_are_refused(dense, statistics):
    family, model = family_of(dense.config), copy.deepcopy(dense)
    bases = bases_for(dense, statistics, "pre", 2, 2)
    narrow = KVProjection(**bases.config.model_dump() | {"num_kv_heads": 1})
    one_head = type(bases)(narrow, *(t[:1] for t in bases.tensors("").values()))
    with pytest.raises(SvdError, match="1 KV heads"):
        install_kv(model, family, ATTENTION, one_head)
    factors = factors_of(dense, f"{LAYER}.mlp.down_proj", 4)
    with pytest.raises(SvdError, match="do not fit"):
        install_factors(model, f"{LAYER}.mlp.up_proj", factors)
    install_factors(model, f"{LAYER}.mlp.down_proj", factors)
    with pytest.raises(SvdError, match="do not fit LowRankLinear"):
        install_factors(model, f"{LAYER}.mlp.down_proj", factors)
    install_kv(model, family, ATTENTION, bases)
    with pytest.raises(SvdError, match="already installed"):
        install_kv(model, family, ATTENTION, bases)
    with pytest.raises(SvdError, match="before K/V projections"):
        install_factors(model, f"{ATTENTION}.v_proj", factors_of(dense, f"{ATTENTION}.v_proj", 4))


def compressed(dense, statistics):
    """A model with factors and one projection of each mode, its checkpoint tensors and config."""
    model, family = copy.deepcopy(dense), family_of(dense.config)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    if dense.config.tie_word_embeddings:
        del state["lm_head.weight"]
    modules, kv = {}, {}
    for path in (f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj", f"{LAYER}.mlp.down_proj"):
        factors = factors_of(dense, path, 6)
        install_factors(model, path, factors)
        modules[path] = factors.config()
        del state[f"{path}.weight"]
        state |= factors.tensors(path)
    for layer, mode in zip(layer_paths(dense.config), ("pre", "post"), strict=False):
        path = f"{layer}.self_attn"
        bases = bases_for(dense, statistics, mode, 5, 3, path).to(torch.float32)
        install_kv(model, family, path, bases)
        kv[path] = bases.config
        state |= bases.tensors(path)
    return model, state, SvdCheckpointConfig(method="plain_svd", modules=modules, kv=kv)


def write(directory, model_config, state, config):
    """A checkpoint directory, assembled by hand from the documented format."""
    shard = "model-00001-of-00001.safetensors"
    save_file({name: t.contiguous() for name, t in state.items()}, directory / shard)
    raw = model_config.to_dict() | {"quantization_config": config.model_dump(mode="json")}
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = {
        name: TensorRecord(dtype="F32", shape=tuple(t.shape), shard=shard)
        for name, t in state.items()
    }
    size = (directory / shard).stat().st_size
    shards = {shard: ShardRecord(bytes=size, sha256=sha256(directory / shard))}
    manifest = Manifest(tensors=tensors, shards=shards)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    index = {"weight_map": dict.fromkeys(state, shard)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_loading_equals_installing_in_memory(dense, statistics, tmp_path):
    model, state, config = compressed(dense, statistics)
    loaded = load(write(tmp_path, dense.config, state, config), "cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not any(p.device.type == "meta" for p in (*loaded.parameters(), *loaded.buffers()))
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == dense.config.tie_word_embeddings


def test_loading_in_another_dtype_casts_everything_but_the_frequencies(dense, statistics, tmp_path):
    _, state, config = compressed(dense, statistics)
    loaded = load(write(tmp_path, dense.config, state, config), "cpu", torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    assert logits(loaded).isfinite().all()


def test_parameters_that_are_missing_odd_or_misshapen_are_all_named(dense, statistics, tmp_path):
    _, state, config = compressed(dense, statistics)
    del state["model.layers.0.input_layernorm.weight"]
    state["model.layers.7.input_layernorm.weight"] = torch.ones(4)
    state["model.norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointFormatError) as caught:
        load(write(tmp_path, dense.config, state, config), "cpu")
    width = dense.config.hidden_size
    assert set(caught.value.problems) == {
        "model.layers.0.input_layernorm.weight: missing",
        "model.layers.7.input_layernorm.weight: not part of this model",
        f"model.norm.weight: shape [3], the model has [{width}]",
    }


def test_a_damaged_shard_is_refused_before_it_is_loaded(dense, statistics, tmp_path):
    _, state, config = compressed(dense, statistics)
    shard = next(write(tmp_path, dense.config, state, config).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match="SHA-256"):
        load(tmp_path, "cpu")


def test_a_dense_directory_loads_as_it_is(tiny_checkpoint):
    model = load(tiny_checkpoint("llama"), "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.training


def test_the_stored_dtype_is_known_before_loading(dense, statistics, tiny_checkpoint, tmp_path):
    _, state, config = compressed(dense, statistics)
    write(tmp_path, dense.config, state, config)
    for directory in (tmp_path, tiny_checkpoint("llama")):
        found, dtype = describe(directory)
        assert dtype == load(directory, "cpu").dtype == torch.float32
        assert found.num_hidden_layers == 2


def test_a_dense_directory_must_hold_exactly_the_model(tiny_checkpoint, tmp_path):
    model = load(tiny_checkpoint("qwen2"), "cpu")
    state = model.state_dict()
    del state["model.layers.1.self_attn.k_proj.bias"]
    state["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(4)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    with pytest.raises(SvdError, match="cannot be loaded"):
        load(tmp_path, "cpu")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SvdError) as caught:
        load(tmp_path, "cpu")
    assert "self_attn.k_proj.bias is missing" in str(caught.value)
    assert "self_attn.o_proj.bias is not part of this model" in str(caught.value)


def test_other_quantisations_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(CheckpointFormatError, match="cannot be read"):
        load(tmp_path, "cpu")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SvdError, match="gptq"):
        load(tmp_path, "cpu")
