"""Compressed checkpoints: complete and exact, and refused once they are damaged."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from runs import recipe_for, tensors_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from offline_compress import reference
from offline_compress.calibration import split
from offline_compress.checkpoint import inspect, restore
from offline_compress.checkpoint.shards import Pending, write_shards
from offline_compress.evaluation import default_bos, perplexity, tokenize_file
from offline_compress.factors import LowRankFactors
from offline_compress.pipeline import compress, load_tokenizer
from offline_compress.planning import plan
from offline_compress.recipe import CompressionRecipe
from offline_compress.weights import SourceError, open_source
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import verify

FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "qwen3", "qwen3_moe")
NO_KV = CompressionRecipe.model_validate({"kv": {"kept": None}}).kv


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def compressed(family, tiny_checkpoint, short_text, tmp_path_factory):
    """(source directory, compressed directory, what compress returned)."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    measured = compress(recipe_for(short_text, kept=0.6), str(tiny_checkpoint(family)), out)
    return tiny_checkpoint(family), out, measured


def test_it_verifies_and_holds_what_the_plan_promised(compressed, short_text):
    source, out, _ = compressed
    config = verify(out)
    ranks = plan(recipe_for(short_text, kept=0.6), open_source(str(source)))
    assert config.modules == ranks.compressed
    assert config.kv == ranks.projected
    held = sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert held == ranks.totals.checkpoint_bytes
    found = inspect(out)
    assert found.plan == ranks
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_what_is_not_compressed_is_copied_bit_for_bit(compressed):
    source, out, _ = compressed
    config, before, after = verify(out), tensors_of(source), tensors_of(out)
    untouched = before.keys() - config.replaced()
    assert after.keys() == untouched | config.tensors().keys()
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    tied = json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    assert ("lm_head.weight" in after) == (not tied)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_the_config_is_the_original_and_the_contract(compressed):
    source, out, _ = compressed
    raw = json.loads((out / "config.json").read_text())
    contract = raw.pop("quantization_config")
    assert raw == json.loads((source / "config.json").read_text())
    assert contract == verify(out).model_dump(mode="json")


@torch.no_grad()
def test_the_stored_model_is_the_one_that_was_measured(compressed, short_text):
    """The sweep ends with the hidden states of both models; here each is loaded whole."""
    source, out, measured = compressed
    tokenizer = load_tokenizer(out)
    bos, tokens = default_bos(tokenizer), tokenize_file(tokenizer, short_text)
    corpus = split(tokens, samples=6, held_out=3, context=64, seed=0, bos=bos)
    models = [reference.load(directory, "cpu", torch.float32) for directory in (source, out)]
    for model, expected in zip(
        models, (measured.perplexity_dense, measured.perplexity), strict=True
    ):
        found = perplexity(model, corpus.held_out, measured.context, 4, bos)
        assert found.perplexity == pytest.approx(expected, rel=1e-6)
        assert found.tokens == measured.scored_tokens
        assert len(corpus.held_out) == measured.held_out_tokens
    assert measured.perplexity != measured.perplexity_dense
    dense, other = (
        model(corpus.held_out_windows()).logits[:, :-1].double().log_softmax(-1) for model in models
    )
    divergence = (dense.exp() * (dense - other)).sum(-1)
    # log-probabilities of about 8 nats are rounded to fp32 in both models
    assert measured.kl_to_dense == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-6)
    same = (dense.argmax(-1) == other.argmax(-1)).double().mean()
    assert measured.top1_agreement == pytest.approx(float(same), abs=1.5 / measured.scored_tokens)
    assert all(0 < error.held_out < 1 for error in measured.matrices.values())
    assert all(0 < error.k_error < 1 for error in measured.caches.values())
    assert measured.matrices.keys() == verify(out).modules.keys()
    assert measured.caches.keys() == verify(out).kv.keys()


def test_the_card_and_the_measurements_agree(compressed):
    _, out, measured = compressed
    assert inspect(out).measured == measured
    assert measured.kl_to_dense > 0
    text = (out / "README.md").read_text()
    for figure in (measured.perplexity, measured.perplexity_dense):
        assert f"{figure:.3f}" in text
    assert f"{inspect(out).plan.totals.checkpoint_bytes:,}" in text
    assert f"over {measured.scored_tokens} scored tokens of the {measured.held_out_tokens}" in text


def test_the_text_is_named_by_its_hash_and_by_no_directory(compressed, short_text):
    _, out, measured = compressed
    digest = hashlib.sha256(short_text.read_bytes()).hexdigest()
    assert (measured.text, measured.text_sha256) == (short_text.name, digest)
    assert digest in (out / "README.md").read_text()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["calibration"]["text"] == short_text.name
    for content in bytes_of(out).values():
        assert str(short_text.parent).encode() not in content
        assert str(out.parent).encode() not in content


def test_restore_multiplies_the_factors_back_to_the_bit(compressed, tmp_path):
    _, out, _ = compressed
    config, stored = verify(out), tensors_of(out)
    assert restore(out, tmp_path / "dense") == (len(config.kv), 0) == (2, 0)
    dense = tensors_of(tmp_path / "dense")
    for path in config.modules:
        weight = LowRankFactors(A=stored[f"{path}.A"], B=stored[f"{path}.B"]).dense()
        assert torch.equal(dense.pop(f"{path}.weight"), weight.float())
    assert dense.keys() == stored.keys() - config.tensors().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in dense.items())
    raw = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert not (tmp_path / "dense" / "manifest.json").exists()
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))


def test_half_precision_is_stored_and_restored_to_the_bit(tiny_checkpoint, short_text, tmp_path):
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint("qwen2"), dtype=torch.bfloat16
    ).save_pretrained(source)
    for path in open_source(str(tiny_checkpoint("qwen2"))).companions():
        (source / path.name).write_bytes(path.read_bytes())
    compress(recipe_for(short_text, kept=0.6), str(source), tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "dense")
    stored, dense = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "dense")
    assert {tensor.dtype for tensor in (stored | dense).values()} == {torch.bfloat16}
    for path in verify(tmp_path / "out").modules:
        exact = stored[f"{path}.B"].double() @ stored[f"{path}.A"].double()
        assert torch.equal(dense[f"{path}.weight"], exact.bfloat16())


def test_the_same_recipe_gives_the_same_bytes(compressed, short_text, tmp_path):
    source, out, _ = compressed
    compress(recipe_for(short_text, kept=0.6), str(source), tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(out)


@pytest.mark.parametrize("method", ["dobi_svd", "gptvq", "impart"])
def test_other_artefacts_are_restored_to_the_model_that_is_served(
    tiny_checkpoint, short_text, tmp_path, method
):
    base = source = tiny_checkpoint("llama")
    options = {"name": method}
    if method == "gptvq":
        options |= {"em_iterations": 5, "sweeps": 1}
    if method == "impart":
        source, options = fine_tuned(base, tmp_path), impart(base)
    recipe = recipe_for(short_text, method=options, kept=0.6).model_copy(update={"kv": NO_KV})
    compress(recipe, str(source), tmp_path / "out")
    assert restore(tmp_path / "out", tmp_path / "dense", base=base) == (0, 0)
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        served, restored = (
            reference.load(tmp_path / name, "cpu", torch.float32, base)(tokens).logits
            for name in ("out", "dense")
        )
    torch.testing.assert_close(served, restored, rtol=0, atol=1e-5 * float(served.abs().max()))


def fine_tuned(base, directory):
    """A copy of a model, moved a little."""
    source = shutil.copytree(base, directory / "tuned")
    held = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, weight in held.items():
        if name.endswith("proj.weight"):
            low = torch.randn(len(weight), 2, generator=generator)
            held[name] = weight + low @ torch.randn(2, weight.shape[1], generator=generator) / 100
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    return source


def impart(base):
    return {"name": "impart", "base": str(base), "bits": 8}


def test_deltas_say_which_model_they_are_differences_from(tiny_checkpoint, short_text, tmp_path):
    base = tiny_checkpoint("llama")
    source, out = fine_tuned(base, tmp_path), tmp_path / "out"
    recipe = recipe_for(short_text, method=impart(base), kept=0.5)
    compress(recipe.model_copy(update={"kv": NO_KV}), str(source), out)
    config, tuned = verify(out), tensors_of(source)
    assert config.base.name == base.name
    assert set(config.deltas) == set(config.modules)
    before, after = (reference.load(m, "cpu", base=base).state_dict() for m in (base, out))
    for name in (f"{path}.weight" for path in config.deltas):
        # the deltas bring back most of what fine-tuning changed
        lost, changed = (float((made[name] - tuned[name]).norm()) for made in (after, before))
        assert lost < 0.5 * changed
    with pytest.raises(SourceError, match="is not the model that the deltas were taken from"):
        restore(out, tmp_path / "dense", base=source)
    other = recipe_for(short_text, method=impart(tiny_checkpoint("qwen2")), kept=0.6)
    with pytest.raises(SourceError, match="has other matrices than"):
        compress(other, str(source), tmp_path / "again")
    for content in bytes_of(out).values():
        assert str(base.parent).encode() not in content


def test_weights_may_stay_dense(tiny_checkpoint, short_text, tmp_path):
    source = tiny_checkpoint("qwen3")
    measured = compress(recipe_for(short_text, kept=1), str(source), tmp_path / "out")
    config = verify(tmp_path / "out")
    assert (config.method, config.modules, len(config.kv)) == ("dense", {}, 2)
    assert measured.matrices == {}
    assert tensors_of(source).keys() <= tensors_of(tmp_path / "out").keys()


def test_shards_hold_every_tensor_once_within_their_size(tmp_path):
    tensors = {f"t{index}": torch.full((16, 16), float(index)) for index in range(7)}
    pending = {
        name: Pending("F32", (16, 16), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }
    manifest = write_shards(tmp_path, pending, max_shard_bytes=2500)
    assert list(manifest.shards) == [
        f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)
    ]
    assert all(
        sum(tensor.nbytes for tensor in load_file(tmp_path / shard).values()) <= 2500
        for shard in manifest.shards
    )
    found = tensors_of(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 1024
    assert index["weight_map"] == {n: record.shard for n, record in manifest.tensors.items()}


def test_a_changed_byte_is_found_by_inspect(compressed, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in bytes_of(compressed[1]).items():
        (copy / name).write_bytes(content)
    shard = next(copy.glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    for use in (inspect, lambda directory: restore(directory, tmp_path / "dense")):
        with pytest.raises(CheckpointFormatError, match="SHA-256 differs"):
            use(copy)
    assert not (tmp_path / "dense").exists()


def test_a_tensor_the_model_does_not_have_is_not_copied(tiny_checkpoint, short_text, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    held = load_file(source / "model.safetensors")
    # old exports carry these
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    compress(recipe_for(short_text, kept=0.6), str(source), tmp_path / "out")
    names = tensors_of(tmp_path / "out").keys()
    assert not any("inv_freq" in name or name == "lm_head.weight" for name in names)


@pytest.fixture
def copied(compressed, tmp_path):
    return shutil.copytree(compressed[1], tmp_path / "copy")


def edit_json(path, edit):
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def assert_refused(directory, message, tmp_path):
    uses = (inspect, lambda d: restore(d, tmp_path / "dense"), lambda d: reference.load(d, "cpu"))
    for use in uses:
        with pytest.raises(CheckpointFormatError, match=message):
            use(directory)
    assert not (tmp_path / "dense").exists()


def test_a_config_of_fewer_layers_is_refused_with_every_module(copied, tmp_path):
    def drop_layer(raw):
        raw["num_hidden_layers"] = 1
        if "layer_types" in raw:
            raw["layer_types"] = raw["layer_types"][:1]

    edit_json(copied / "config.json", drop_layer)
    for path in ("self_attn.o_proj: compressed in", "self_attn: projected in"):
        assert_refused(copied, rf"model\.layers\.1\.{path} config\.json", tmp_path)


def test_a_dense_tensor_that_even_the_manifest_lacks_is_missed(copied, tmp_path):
    shard = next(copied.glob("*.safetensors"))
    held = load_file(shard)
    del held["model.norm.weight"]
    save_file(held, shard, metadata={"format": "pt"})
    record = {
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }

    def forget(raw):
        del raw["tensors"]["model.norm.weight"]
        raw["shards"][shard.name] = record

    edit_json(copied / "manifest.json", forget)
    index = copied / "model.safetensors.index.json"
    edit_json(index, lambda raw: raw["weight_map"].pop("model.norm.weight"))
    verify(copied)
    assert_refused(copied, r"model\.norm\.weight: missing", tmp_path)


def test_inspect_shows_the_ranks_that_are_served(compressed, copied):
    path = next(iter(verify(copied).modules))
    edit_json(copied / "plan.json", lambda raw: raw["matrices"][path]["module"].update(rank=3))
    assert inspect(copied).plan == inspect(compressed[1]).plan
    edit_json(copied / "plan.json", lambda raw: raw["matrices"].pop(path))
    with pytest.raises(CheckpointFormatError, match=rf"plan\.json and the model differ in {path}"):
        inspect(copied)
