"""What is wrong with a command's input is found before the work, and told at once."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_compress import reference
from offline_compress.evaluation import default_bos, perplexity, tokenize_file
from offline_compress.preflight import load_tokenizer


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_everything_wrong_is_told_at_once(invoke, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out"
    out.mkdir()
    for command in ("run", "plan"):
        code, output, errors = invoke(
            *(command, "./absent", out, "--recipe", recipe, "--text", tmp_path / "absent.txt"),
            *("--device", "cuda", "--kv-mode", "mid", "--method", "magic"),
        )
        assert (code, output) == (1, "")
        assert errors.startswith("error: 5 problems were found")
        for what in (
            "kv.mode (--kv-mode): 'mid' was given",
            "weights.method (--method)",
            f"{tmp_path}/absent.txt cannot be read",
            "no CUDA device",
            "MODEL ./absent: no such directory",
            f"{out} already exists",
        ):
            assert what in errors


def test_a_missing_base_is_told_with_the_rest(refused, recipe, tmp_path):
    recipe.write_text("weights: {method: {name: impart, base: ./absent}}")
    errors = refused(text=tmp_path / "absent.txt")
    assert "error: 2 problems were found" in errors
    assert "weights.method.base ./absent: no such directory" in errors
    assert "absent.txt cannot be read" in errors


def test_the_disk_must_hold_hidden_states_that_memory_does_not(
    invoke, model, recipe, short_text, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    command = ["plan", model, tmp_path / "out", "--recipe", recipe, "--text", short_text]
    assert invoke(*command)[0] == 0
    recipe.write_text(
        "calibration: {samples: 200, context: 64, host_memory_gib: 0.000000001}\n"
        "evaluation: {samples: 2}"
    )
    code, _, errors = invoke(*command)
    assert code == 1
    assert "it needs" in errors and "5,000,000 are free there" in errors


def test_flags_and_layers_beyond_the_model_are_told_together(refused, recipe):
    recipe.write_text("kv: {layers: {7: {k_rank: 8}}}\ncalibration: {context: 4096}")
    errors = refused("--kept", "7")
    assert "--kept" in errors
    assert "kv.layers.7: the model's layers are 0 to 1" in errors
    assert "4096 exceeds the model's 512 positions" in errors


def test_a_text_that_may_stand_in_an_unreadable_recipe_is_not_asked_for(refused, recipe):
    recipe.write_text("{")
    assert "missing" not in refused(text=None)


def test_plan_checks_the_text_that_it_is_given(invoke, model, tmp_path):
    (tmp_path / "text.txt").write_text("short")
    code, _, errors = invoke("plan", model, "--text", tmp_path / "text.txt")
    assert code == 1
    assert "need 40960" in errors


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_too_long_for_the_file_system(refused, tmp_path, length):
    # 240 fits, but not with what is added to it while it is written
    assert "choose a shorter name" in refused(out=tmp_path / ("o" * length))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
        {"num_attention_heads": 5},
        {"num_hidden_layers": "2"},
    ],
)
def test_config_values_that_transformers_refuses(refused, model, changes):
    edit_config(model, **changes)
    errors = refused()
    assert "is not one transformers accepts" in errors
    assert "Qwen3-MoE model with its own config.json" in errors
    assert "foo" in errors or "(5)" in errors or "num_hidden_layers" in errors


def test_a_quantization_config_that_is_no_object(invoke, refused, model, short_text):
    edit_config(model, quantization_config="svd")
    assert "quantization_config is 'svd'; an object was expected" in refused()
    code, _, errors = invoke("evaluate", model, "--text", short_text)
    assert code == 1
    assert "Traceback" not in errors


def test_a_tokenizer_of_another_model(invoke, refused, model, short_text):
    held = load_file(model / "model.safetensors")
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"][:300].clone()
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    edit_config(model, vocab_size=300)
    for errors in (refused(), invoke("evaluate", model, "--text", short_text)[2]):
        assert "the tokenizer, of 4096 tokens, gives token id" in errors
        assert "the model embeds 300" in errors


def test_evaluate_finds_what_is_wrong_before_it_loads(invoke, model, short_text, tmp_path):
    shard = model / "model.safetensors"
    held = load_file(shard)

    def refusal(directory=model, context=64, text=short_text):
        code, output, errors = invoke("evaluate", directory, "--text", text, "--context", context)
        assert (code, output) == (1, "")
        assert "Traceback" not in errors
        return errors

    assert "2 problems" in (errors := refusal(tmp_path / "absent", text=tmp_path / "none.txt"))
    assert "absent: no such directory" in errors
    assert "600 tokens exceeds the model's 512 positions" in refusal(context=600)
    for name, tensor, message in (
        ("model.norm.weight", torch.ones(7), "shape [7]"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int8), "dtype I8"),
        ("odd.weight", torch.ones(2), "odd.weight: not part of this model"),
    ):
        save_file(held | {name: tensor}, shard, metadata={"format": "pt"})
        assert message in refusal()
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors is damaged" in refusal()
    shard.rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text("{")
    assert "is not an index of safetensors files" in refusal()


def test_evaluate_states_its_protocol(invoke, model, short_text):
    arguments = ("evaluate", model, "--text", short_text, "--context", "64")
    _, output, _ = invoke(*arguments, "--json")
    found = json.loads(output)
    assert (found["context"], found["stride"], found["bos"], found["dtype"]) == (
        *(64, 63, True),
        "float32",
    )
    assert found["windows"] == math.ceil(found["tokens"] / 63)
    _, output, _ = invoke(*arguments)
    assert f"over {found['tokens']} scored tokens, context 64" in output
    assert f"{found['windows']} non-overlapping windows of BOS and 63 tokens, in float32" in output


def test_evaluate_in_half_precision_keeps_the_frequencies(
    invoke, model, short_text, tmp_path, monkeypatch
):
    # what a GPU does with a bf16 model; on a CPU evaluate computes in fp32
    monkeypatch.setattr("offline_compress.preflight.compute_dtype", lambda *_: torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text(short_text.read_text()[:4000])
    _, output, _ = invoke("evaluate", model, "--text", text, "--context", "500", "--json")
    tokenizer = load_tokenizer(model)
    tokens, bos = tokenize_file(tokenizer, text), default_bos(tokenizer)
    right, rounded = (
        perplexity(network, tokens, 500, 4, bos).nll
        for network in (
            reference.load(model, "cpu", torch.bfloat16),
            reference.load(model, "cpu").to(torch.bfloat16),
        )
    )
    assert right != rounded
    assert json.loads(output)["nll"] == right
    assert json.loads(output)["dtype"] == "bfloat16"
