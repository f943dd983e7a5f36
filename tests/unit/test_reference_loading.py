"""Checkpoint directories that the reference model loads whole, and those that it refuses."""

import copy
import json
import shutil

import pytest
import torch
from reference_models import ATTENTION, LAYER, MADE, bases_for, install_kv, logits
from safetensors.torch import load_file, save_file

from offline_compress.families import layer_paths
from offline_compress.reference import describe, install_factors, load
from offline_compress.weights import open_source, reference_to
from vllm_svd.errors import CheckpointFormatError, SvdError
from vllm_svd.format import Manifest, ShardRecord, SvdCheckpointConfig, TensorRecord, sha256

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}


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
    config = {"model_type": "llama", "quantization_config": {"quant_method": "exl2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SvdError, match="quantised by exl2; accepted"):
        load(tmp_path, "cpu")
