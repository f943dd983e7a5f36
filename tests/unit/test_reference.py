"""The reference model against the dense model and against attention written out by hand."""

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from offline_compress.factors import (
    ARTEFACTS,
    CodebookFactors,
    DeltaFactors,
    LowRankFactors,
    LowRankInt8Factors,
    ReducedFactors,
)
from offline_compress.factors.codebook import packed
from offline_compress.families import family_of, head_dim, layer_paths
from offline_compress.kv import project
from offline_compress.reference import CompressedLinear, describe, install_factors, load
from offline_compress.reference import install_kv as install_on_layer
from offline_compress.weights import open_source, reference_to
from vllm_svd.errors import CheckpointFormatError, SvdError
from vllm_svd.format import (
    Delta,
    KVProjection,
    Manifest,
    ShardRecord,
    SvdCheckpointConfig,
    TensorRecord,
    sha256,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
CONTEXT = 48
LAYER, ATTENTION = "model.layers.1", "model.layers.1.self_attn"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}


def tokens_for(model, samples=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (samples, CONTEXT), generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def dense(directory):
    return load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def statistics(dense, directory, network_of, kv_statistics):
    network, windows = network_of(directory), tokens_for(dense, samples=4)
    return {mode: kv_statistics(network, windows, mode) for mode in ("pre", "post")}


def install_kv(model, path, bases):
    """On the attention layer at `path` of a whole model."""
    family = family_of(model.config)
    layer = model.get_submodule(path.removesuffix(f".{family.attention}"))
    install_on_layer(layer, family, path, bases)


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
        install_kv(model, path, bases)
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
def test_reduced_rank_changes_the_logits(dense, statistics, mode):
    model = copy.deepcopy(dense)
    install_kv(model, ATTENTION, bases_for(dense, statistics, mode, 2, 2))
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
        install_kv(model, path, bases)
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


def corrected(weight):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(weight), generator=generator)


def low_rank(weight):
    basis = torch.linalg.svd(weight.double()).U[:, :5]
    return LowRankFactors(A=basis.T @ weight.double(), B=basis, correction=corrected(weight))


def low_rank_int8(weight):
    basis = torch.linalg.svd(weight.double()).U[:, :5]
    return LowRankInt8Factors.quantize(basis.T @ weight.double(), basis, a_tail=3, b_tail=2)


def codebook(weight):
    """Of random centroids and choices, in 2 x 2 groups; the last ones are narrower."""
    generator, (rows, columns) = torch.Generator().manual_seed(3), weight.shape
    group_rows, group_columns = rows // 2 + 1, columns // 2 // 4 * 4 + 4
    chosen = torch.randint(0, 8, (rows, columns // 4), generator=generator)
    centroids = torch.randint(-9, 9, (2, 2, 8, 4), generator=generator, dtype=torch.int8)
    scales = torch.rand(2, 2, generator=generator) / 100
    indices = packed(chosen, 3)
    return CodebookFactors(
        indices, centroids, scales, columns, group_rows, group_columns, correction=corrected(weight)
    )


def reduced(weight):
    rows, columns = torch.arange(0, len(weight), 2), torch.arange(1, weight.shape[1], 3)
    kept = weight[rows][:, columns]
    return ReducedFactors.of(kept, tuple(weight.shape), rows=rows, columns=columns)


def delta(weight):
    """On the weight itself, from which the checkpoint then differs."""
    generator, (rows, columns) = torch.Generator().manual_seed(4), weight.shape
    factors = {
        name: torch.randn(3, length, generator=generator) / 30
        for name, length in (("U", rows), ("V", columns))
    }
    counts = {name: torch.tensor([9, 0, 5]) for name in factors}
    config = Delta(out_features=rows, in_features=columns, rank=3, kept_u=14, kept_v=14, bits=8)
    return DeltaFactors.pack(config, factors, counts).on(weight)


MADE = {
    "low_rank": low_rank,
    "low_rank_int8": low_rank_int8,
    "codebook": codebook,
    "reduced": reduced,
    "delta": delta,
}


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


def compressed(dense, statistics, directory):
    """A model of every artefact and a projection of each mode, its tensors and its config.

    Its deltas are differences from the dense model in `directory`.
    """
    model = copy.deepcopy(dense)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    if dense.config.tie_word_embeddings:
        del state["lm_head.weight"]
    modules, kv = {}, {}
    mlp = "mlp.experts.3" if "moe" in dense.config.model_type else "mlp"
    leaves = (f"{mlp}.up_proj", f"{mlp}.down_proj", *(f"self_attn.{side}_proj" for side in "qvo"))
    for path, kind in zip((f"{LAYER}.{leaf}" for leaf in leaves), MADE, strict=True):
        factors = MADE[kind](dense.get_submodule(path).weight.detach()).to(torch.float32)
        install_factors(model, path, factors)
        modules[path] = factors.config()
        del state[f"{path}.weight"]
        state |= factors.tensors(path)
    for layer, mode in zip(layer_paths(dense.config), ("pre", "post"), strict=False):
        path = f"{layer}.self_attn"
        bases = bases_for(dense, statistics, mode, 5, 3, path).to(torch.float32)
        install_kv(model, path, bases)
        kv[path] = bases.config
        state |= bases.tensors(path)
    base = reference_to(open_source(str(directory)), [f"{ATTENTION}.o_proj"])
    return model, state, SvdCheckpointConfig(method="several", modules=modules, kv=kv, base=base)


def write(directory, model_config, state, config):
    """A checkpoint directory, assembled by hand from the documented format."""
    shard = "model-00001-of-00001.safetensors"
    save_file({name: t.contiguous() for name, t in state.items()}, directory / shard)
    raw = model_config.to_dict() | {"quantization_config": config.model_dump(mode="json")}
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = {
        name: TensorRecord(dtype=DTYPES[t.dtype], shape=tuple(t.shape), shard=shard)
        for name, t in state.items()
    }
    size = (directory / shard).stat().st_size
    shards = {shard: ShardRecord(bytes=size, sha256=sha256(directory / shard))}
    manifest = Manifest(tensors=tensors, shards=shards)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    index = {"weight_map": dict.fromkeys(state, shard)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_loading_equals_installing_in_memory(dense, statistics, directory, tmp_path):
    model, state, config = compressed(dense, statistics, directory)
    loaded = load(write(tmp_path, dense.config, state, config), "cpu", base=directory)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not any(p.device.type == "meta" for p in (*loaded.parameters(), *loaded.buffers()))
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == dense.config.tie_word_embeddings


def test_loading_in_another_dtype_casts_everything_but_the_frequencies(
    dense, statistics, directory, tmp_path
):
    _, state, config = compressed(dense, statistics, directory)
    loaded = load(write(tmp_path, dense.config, state, config), "cpu", torch.bfloat16, directory)
    stored = {name: stored.dtype for name, stored in config.tensors().items()}
    for name, tensor in loaded.state_dict().items():
        assert DTYPES[tensor.dtype] == (stored.get(name) or "BF16")
        if stored.get(name):  # what is packed stays as it is
            assert torch.equal(tensor, state[name])
    assert torch.equal(loaded.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    assert logits(loaded).isfinite().all()


def test_deltas_are_added_to_no_other_base(dense, statistics, directory, tmp_path):
    _, state, config = compressed(dense, statistics, directory)
    absent = config.base.model_copy(update={"name": str(tmp_path / "absent")})
    write(tmp_path, dense.config, state, config.model_copy(update={"base": absent}))
    with pytest.raises(SvdError, match=r"differences from .*absent, which was not found"):
        load(tmp_path, "cpu")
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    held = load_file(other / "model.safetensors")
    held[f"{ATTENTION}.o_proj.weight"][0, 0] += 1
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SvdError, match="is not the model that the deltas were taken from"):
        load(tmp_path, "cpu", base=other)


def test_parameters_that_are_missing_odd_or_misshapen_are_all_named(
    dense, statistics, directory, tmp_path
):
    _, state, config = compressed(dense, statistics, directory)
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


def test_a_damaged_shard_is_refused_before_it_is_loaded(dense, statistics, directory, tmp_path):
    _, state, config = compressed(dense, statistics, directory)
    shard = next(write(tmp_path, dense.config, state, config).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match="SHA-256"):
        load(tmp_path, "cpu")


def test_a_dense_directory_loads_as_it_is(directory):
    model = load(directory, "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.training
    stored = load_file(directory / "model.safetensors")
    state = model.state_dict()  # experts under the names that the file gives them
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in stored.items())


def test_the_stored_dtype_is_known_before_loading(dense, statistics, directory, tmp_path):
    _, state, config = compressed(dense, statistics, directory)
    write(tmp_path, dense.config, state, config)
    for described in (tmp_path, directory):
        found, dtype = describe(described)
        assert dtype == load(described, "cpu", base=directory).dtype == torch.float32
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
