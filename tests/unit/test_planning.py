"""Plans of whole models: bytes as they are on disk, memory, warnings, and passes in groups."""

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_compress import calibration, pipeline, planning
from offline_compress.calibration import Corpus, gram_bytes
from offline_compress.methods import workspace_bytes
from offline_compress.planning import plan
from offline_compress.recipe import CompressionRecipe
from offline_compress.reference import load
from offline_compress.report import plan_tables
from offline_compress.weights import open_source


def recipe_of(method="svd_llm", kept=0.6, kv=None, **windows):
    return CompressionRecipe.model_validate(
        {
            "weights": {"method": method, "kept": kept},
            "kv": {"kept": None} | (kv or {}),
            "calibration": {"samples": 4, "context": 64} | windows,
        }
    )


@pytest.fixture
def source(tiny_checkpoint):
    """Two decoder layers of hidden size 64 and intermediate size 160."""
    return open_source(str(tiny_checkpoint("llama")))


@pytest.mark.parametrize("kept", [0.6, 0.9])
def test_bytes_are_those_of_the_files_where_the_config_names_another_dtype(
    tiny_checkpoint, tmp_path, kept
):
    """The file holds fp32, but for one matrix; factors and bases are stored in bfloat16."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    held = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    save_file(held | {name: held[name].bfloat16()}, directory / "model.safetensors")
    source = replace(open_source(str(directory)), dtype="BF16")

    made = plan(recipe_of(kept=kept, kv={"kept": 0.5}), source)
    stored = {name: tensor.nbytes for name, tensor in held.items()}
    stored[name] //= 2
    assert made.totals.checkpoint_bytes_dense == sum(stored.values())
    added = sum(rank * sum(held[f"{path}.weight"].shape) for path, rank in made.compressed.items())
    added += sum(cache.basis_parameters for cache in made.caches.values())
    for path in made.compressed:
        del stored[f"{path}.weight"]
    assert made.totals.checkpoint_bytes == 2 * added + sum(stored.values())


def test_a_method_pays_for_the_memory_and_the_passes_that_it_needs(source):
    costs = {name: plan(recipe_of(name), source).calibration for name in ("svd", "asvd", "svd_llm")}
    assert {name: cost.passes for name, cost in costs.items()} == {
        "svd": 0,
        "asvd": 1,
        "svd_llm": 1,
    }
    per_layer = gram_bytes([64, 128, 64, 160])  # q, o, gate and down
    assert {name: cost.gram_bytes for name, cost in costs.items()} == {
        "svd": 0,
        "asvd": 0,
        "svd_llm": 2 * per_layer,
    }
    for cost in costs.values():
        assert cost.workspace_bytes == workspace_bytes(64, 160)
        assert cost.weight_elements == sum(
            tensor.numel() for tensor in load(source.directory, "cpu").parameters()
        )


@pytest.fixture
def grams_of_one_layer(monkeypatch):
    budget = gram_bytes([64, 128, 64, 160])
    monkeypatch.setattr(planning, "groups", lambda widths: calibration.groups(widths, budget))
    return budget


def test_groups_give_the_factors_of_one_pass_and_never_hold_two_groups(
    source, grams_of_one_layer, monkeypatch
):
    recipe = recipe_of()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (8, 64), generator=generator)
    corpus = Corpus(tokens[:4], tokens[4:].flatten(), None)
    network = load(source.directory, "cpu", torch.float32)
    ranks = plan(recipe, source)
    assert (ranks.calibration.passes, ranks.calibration.gram_bytes) == (2, grams_of_one_layer)
    held, alive = [], []

    def watched(*arguments):
        gc.collect()
        alive.append([gram for gram in held if gram() is not None])
        found = calibration.collect(*arguments)
        held.extend(weakref.ref(one.gram) for one in found.values())
        return found

    def factorised():
        found = pipeline._factorize(network, recipe, source, ranks, corpus, lambda *_: None)
        return {path: done.factors for path, done in found.items()}

    monkeypatch.setattr(pipeline, "collect", watched)
    grouped = factorised()
    assert alive == [[], []]
    assert len(held) == 8
    monkeypatch.setattr(planning, "groups", calibration.groups)
    whole = factorised()
    assert list(grouped) == list(whole) == list(ranks.compressed)
    for path, factors in whole.items():
        assert torch.equal(grouped[path].A, factors.A)
        assert torch.equal(grouped[path].B, factors.B)


def test_too_few_tokens_for_a_gram_are_warned_of(source):
    (warning,) = plan(recipe_of(samples=9), source).warnings
    assert warning.startswith("576 calibration tokens are fewer than 4 per input channel of ")
    assert "model.layers.*.mlp.down_proj (160)" in warning
    assert "gate_proj" not in warning
    assert warning.endswith("--samples 10 gives enough")
    assert plan(recipe_of(samples=10), source).warnings == ()
    assert plan(recipe_of("asvd", samples=1), source).warnings == ()


def test_a_context_too_short_for_rotated_keys_is_warned_of(source):
    budget = {"kept": 0.5, "mode": "post"}
    (warning,) = plan(recipe_of("svd", kv=budget), source).warnings
    assert "64 of the model's 512 positions" in warning
    assert plan(recipe_of("svd", kv=budget, context=128), source).warnings == ()
    assert plan(recipe_of("svd", kv={"kept": 0.5}), source).warnings == ()


def test_the_tables_show_memory_and_warnings(source):
    made = plan(recipe_of(), source)
    *_, memory = plan_tables(made)
    cost = made.calibration
    for figure in (cost.gram_bytes, cost.workspace_bytes, 4 * cost.weight_elements):
        assert f"{figure:,} bytes" in str(memory)
    assert f"warning: {made.warnings[0]}" in str(memory).splitlines()
