"""Plans of whole models: bytes as they are on disk, memory, operations and warnings."""

import gc
import math
import re
import shutil
import weakref
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_compress import cache_evidence, evidence, pipeline, recovery, sweep
from offline_compress.allocation import CacheEvidence
from offline_compress.calibration import HiddenStates, Network
from offline_compress.calibration.gates import GatedModel
from offline_compress.checkpoint import inspect
from offline_compress.methods import Gptvq, SvdLlm, workspace_bytes
from offline_compress.planning import layers_of, matrices_of, plan
from offline_compress.recipe import CompressionRecipe, RecipeError
from offline_compress.report import plan_tables
from offline_compress.weights import open_source
from offline_compress.workspace import work_root
from vllm_svd.format.manifest import read_header

UPDATED = {"name": "svd_llm", "update": True}
RECOVERED = {"name": "svd_llm", "recover": {"steps": 3}}
WHOLE = ("recover=Recovery", "strs", "water_filling", "learned", "measured")  # read the whole model


def recipe_of(method="svd_llm", kept=0.6, kv=None, allocator="uniform", **windows):
    return CompressionRecipe.model_validate(
        {
            "weights": {"method": method, "kept": kept, "allocator": allocator},
            "kv": {"kept": None} | (kv or {}),
            "calibration": {"samples": 4, "context": 64} | windows,
            "evaluation": {"samples": 2},
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
    added = sum(
        module.rank * sum(held[f"{path}.weight"].shape) for path, module in made.compressed.items()
    )
    added += sum(cache.basis_parameters for cache in made.caches.values())
    for path in made.compressed:
        del stored[f"{path}.weight"]
    assert made.totals.checkpoint_bytes == 2 * added + sum(stored.values())


def test_layers_are_as_methods_and_allocators_see_them(tiny_checkpoint):
    source = open_source(str(tiny_checkpoint("qwen3_moe")))
    layers = layers_of(source)
    stored = load_file(source.directory / "model.safetensors")
    for layer in layers:
        for path, shape in layer.shapes.items():
            assert stored[f"{path}.weight"].shape == shape
            assert layer.dense_bytes(path) == stored[f"{path}.weight"].nbytes
        assert (layer.query_heads, layer.kv_heads, layer.head_dim) == (4, 2, 32)
        assert layer.qk_norm
    matrices = matrices_of(layers, SvdLlm())
    assert list(matrices) == list(source.linears())
    assert all(f"model.layers.{m.layer}." in path for path, m in matrices.items())
    assert {m.kind for m in matrices.values()} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    up = matrices["model.layers.1.mlp.experts.3.up_proj"]
    assert up.rank_share == Fraction(64 + 96, 64 * 96)  # of the dense bytes, for every rank
    assert {m.rank_share for m in matrices_of(layers, Gptvq()).values()} == {None}
    made = plan(recipe_of(), source)
    assert made.matrices.keys() == matrices.keys()
    assert "model.layers.1.mlp.experts.3.down_proj" in made.compressed


def test_measured_shares_are_planned_to_the_rank(source):
    shares = {path: Fraction(9, 10) for path in source.linears()}
    shares["model.layers.1.mlp.up_proj"] = Fraction(1, 10)
    shares["model.layers.1.mlp.down_proj"] = Fraction(1)
    made = plan(recipe_of(allocator="strs"), source, shares)
    assert made.compressed["model.layers.1.mlp.up_proj"].rank == 64 * 160 // (10 * 224)
    assert made.compressed["model.layers.0.mlp.up_proj"].rank == 9 * 64 * 160 // (10 * 224)
    down = made.matrices["model.layers.1.mlp.down_proj"]
    assert (down.module, down.method, down.reason) == (None, "dense", "its share is all of it")
    tokens = plan(recipe_of(), source, shares).warnings
    assert made.warnings == tokens  # nothing says that the allocator has still to measure


def test_an_allocator_that_must_measure_is_shown_as_uniform_and_the_plan_says_so(source):
    uniform, measured = (plan(recipe_of(allocator=a), source) for a in ("uniform", "strs"))
    assert measured.matrices == uniform.matrices
    assert measured.warnings[1:] == uniform.warnings
    assert "the strs allocator measures before it decides" in measured.warnings[0]


def test_an_allocator_of_ranks_refuses_a_method_that_has_none(source):
    recipe = recipe_of("gptvq", kept=0.3, allocator="truncation_loss", context=4096)
    with pytest.raises(RecipeError) as caught:
        plan(recipe, source)
    assert caught.value.problems == (
        "calibration.context: 4096 exceeds the model's 512 positions",
        "weights.allocator: truncation_loss was given, and gptvq does not split into ranks; "
        "accepted with it are uniform, block_influence",
    )
    plan(recipe_of("gptvq", kept=0.3, allocator="block_influence"), source)
    with pytest.raises(RecipeError, match="gptvq does not predict losses; accepted with it are"):
        plan(recipe_of("gptvq", kept=0.3, allocator="knapsack"), source)


def test_a_method_pays_for_the_moments_that_it_needs(source):
    """Hidden 64, attention out 128, intermediate 160: what q, o, gate and down read."""
    costs = {
        name: plan(recipe_of(method), source).calibration
        for name, method in (
            *((name, name) for name in ("svd", "asvd", "svd_llm", "gfwsvd")),
            ("updated", UPDATED),
        )
    }
    one = 8 * (64**2 + 128**2 + 64**2 + 160**2)
    grams = {name: cost.gram_bytes for name, cost in costs.items()}
    # with x' only one stage of a layer is measured at a time, in two moments
    outputs = 8 * (128**2 + 2 * 64**2 + 64**2 + 2 * 160**2 + 64**2)  # q, k and v, o, MLP
    assert grams == {
        "svd": 0,
        "asvd": 0,
        "svd_llm": one,
        "gfwsvd": one + outputs,
        "updated": 2 * 8 * 160**2,
    }
    elements = sum(rows * columns for rows, columns in source.linears().values())
    for cost in costs.values():
        assert cost.workspace_bytes == workspace_bytes(64, 160)
        assert cost.block_bytes == 2 * 4 * elements // 2  # of two equal layers
    assert costs["svd"].factor_operations < costs["svd_llm"].factor_operations


@pytest.mark.parametrize(
    ("family", "method", "allocator"),
    [
        *(("llama", name, "uniform") for name in ("svd", "svd_llm", "fwsvd", "gfwsvd")),
        ("llama", UPDATED, "uniform"),
        ("llama", RECOVERED, "uniform"),
        ("llama", "svd", "strs"),
        ("llama", "svd_llm", "water_filling"),
        ("llama", "svd_llm", "learned"),
        ("llama", "svd_llm_v2", "truncation_loss"),
        ("llama", "svd", "block_influence"),
        ("qwen3_moe", "svd_llm", "uniform"),
        ("llama", "svd", "caches"),
        ("qwen3_moe", "svd", "caches"),
    ],
    ids=str,
)
def test_the_expected_cost_is_that_of_a_run(
    tiny_checkpoint, short_text, tmp_path, monkeypatch, family, method, allocator
):
    """Passes of linear layers, hidden states, moments and files, each counted."""
    source = open_source(str(tiny_checkpoint(family)))
    samples = 6 if "fwsvd" in method else 8  # 3 borders of the calibration set, or both streams
    options = {"name": "strs", "grid": [0.3, 0.6]} if allocator == "strs" else allocator
    cache = {"kept": 0.5}
    if allocator == "caches":
        options, cache = "uniform", {"kept": 0.1, "store": "tiers", "allocator": "measured"}
    recipe = recipe_of(method, kv=cache, allocator=options, text=str(short_text), samples=samples)
    weights = [
        sum(math.prod(s) / (2 if ".experts." in path else 1) for path, s in layer.shapes.items())
        for layer in layers_of(source)  # two of four experts see a token
    ]
    counted, hidden, files, grams, held = [], [], [], [], []
    forward, logits, collect = Network.forward, Network.logits, sweep.collect

    def watched_forward(network, index, block, states):
        passes = 2 if states.requires_grad else 1  # and one back to the inputs
        counted.append(passes * 2 * states.shape[:-1].numel() * weights[index])
        return forward(network, index, block, states)

    def watched_logits(network, states):
        passes = 2 if states.requires_grad else 1
        counted.append(passes * 2 * states.numel() * source.config.vocab_size)
        return logits(network, states)

    head = source.config.vocab_size * source.config.hidden_size
    gradients, loss, gated = recovery._gradients, evidence._Losses._loss, GatedModel.__call__

    def whole(passes, tokens):
        counted.append(passes * 2 * tokens * (sum(weights) + head))

    def watched_gradients(model, network, windows, *rest):
        whole(4, windows.numel())
        return gradients(model, network, windows, *rest)

    def watched_loss(losses):
        whole(1, losses.windows.numel())
        return loss(losses)

    def watched_gated(model, positions, window):
        whole(4, model.windows[window].numel())
        return gated(model, positions, window)

    def watched_hidden(model, window):
        counted.append(2 * window.numel() * sum(weights))
        return read(model, window)

    def watched_divergence(lm_head, pairs):
        pairs = list(pairs)
        counted.extend(2 * 2 * len(first) * head for first, _ in pairs)
        return divergence(lm_head, pairs)

    read, divergence = cache_evidence._hidden, cache_evidence.divergence
    monkeypatch.setattr(cache_evidence, "_hidden", watched_hidden)
    monkeypatch.setattr(cache_evidence, "divergence", watched_divergence)
    monkeypatch.setattr(recovery, "_gradients", watched_gradients)
    monkeypatch.setattr(evidence._Losses, "_loss", watched_loss)
    monkeypatch.setattr(GatedModel, "__call__", watched_gated)

    def watched_collect(*arguments):
        gc.collect()
        assert not any(gram() is not None for gram in held)  # of the blocks before
        found = collect(*arguments)
        squares = [
            m for s in found.values() for m in vars(s).values() if getattr(m, "ndim", 0) == 2
        ]
        grams.append(sum(square.nbytes for square in squares))
        held.extend(map(weakref.ref, squares))
        return found

    def alive():
        return [item for item in gc.get_objects() if type(item) is HiddenStates]

    others = alive()  # of fixtures

    def watch(*_):
        hidden.append(sum(states.bytes for states in alive() if states not in others))
        records = work_root(tmp_path / "out").glob("*/*.safetensors")
        files.append(sum(e.bytes for path in records for e in read_header(path).values()))

    monkeypatch.setattr(Network, "forward", watched_forward)
    monkeypatch.setattr(Network, "logits", watched_logits)
    monkeypatch.setattr(sweep, "collect", watched_collect)
    pipeline.compress(recipe, str(source.directory), tmp_path / "out", watch)
    cost = plan(recipe, source).calibration
    assert sum(counted) == cost.forward_operations
    assert max(hidden) == cost.hidden_bytes

    def decided(made):  # by allocators that measure
        bases = sum(cache.basis_parameters for cache in made.caches.values())
        return made.totals.linear_bytes + 4 * bases

    chosen, planned = decided(inspect(tmp_path / "out").plan), decided(plan(recipe, source))
    dense = [
        plan.dense_bytes(4)
        for plan in inspect(tmp_path / "out").plan.matrices.values()
        if not plan.module
    ]
    assert max(files) == cost.work_bytes - planned + chosen - sum(dense)
    assert (cost.model_bytes > 0) == any(name in str(recipe) for name in WHOLE)
    if method == "gfwsvd":  # beside them the moments of its outputs
        rows = [m for layer in layers_of(source)[:1] for m, _ in layer.shapes.values()]
        grams.append(max(grams) + sum(8 * m**2 for m in rows))
    if method != "fwsvd" and allocator == "uniform":  # vectors alone, and matrices left dense
        assert max(grams) == cost.gram_bytes


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


def test_the_tables_show_every_artefact_its_cost_and_the_warnings(source):
    made = plan(recipe_of(kept=0.9), source)
    matrices, _, totals, memory = plan_tables(made)
    shown = dict(zip(matrices.columns[0].cells, matrices.columns[3].cells, strict=True))
    assert shown == {
        path: f"rank {matrix.rank}" if matrix.module else "-"
        for path, matrix in made.matrices.items()
    }
    assert f"{made.totals.linear_bytes:,}" in totals.columns[2].cells
    cost = made.calibration
    for figure in (
        *(cost.block_bytes, cost.gram_bytes, cost.workspace_bytes),
        *(cost.hidden_bytes, cost.work_bytes),
    ):
        assert re.search(rf"\b{figure:,}\b", str(memory))
    assert f"warning: {made.warnings[0]}" in str(memory).splitlines()


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({"store": "int8", "kept": 0.001}, "the least that latents take keeps 0.078"),
        ({"store": "int8", "kept": 0.25}, None),
        ({"store": "int8", "kept": 0.001, "k_kept": 0.25, "v_kept": 0.25}, None),
        ({"kept": 0.4}, "ranks of the nearest size keep 0.500"),
        ({"kept": 0.5}, None),
        ({"kept": None, "k_kept": 0.5}, None),
        ({"kept": 0.001, "allocator": "measured"}, "the least that latents take keeps 0.250"),
        ({"kept": 0.4, "layers": {0: {"k_rank": 16}}}, None),
    ],
)
def test_a_cache_budget_that_cannot_be_kept_is_warned_of(source, cache, said):
    warnings = plan(recipe_of(kv=cache), source).warnings
    found = [warning for warning in warnings if "cache's bytes" in warning]
    assert len(found) == (said is not None)
    if said is not None:
        assert found[0].startswith(said) and found[0].endswith(f"the {cache['kept']} asked for")


@pytest.mark.parametrize("cache", [{"store": "tiers"}, {"allocator": "measured"}])
def test_sizes_of_caches_that_wait_for_a_measurement_are_said_to_be_a_guess(source, cache):
    recipe = recipe_of(kv={"kept": 0.5} | cache)
    assert any("geometric spectrum" in warning for warning in plan(recipe, source).warnings)
    channels = torch.ones(1, 16, dtype=torch.float64)
    seen = CacheEvidence([(channels, channels)] * 2, [(1.0, 1.0)] * 2)
    known = plan(recipe, source, measured=seen).warnings
    assert not any("geometric spectrum" in warning for warning in known)


@pytest.mark.parametrize("cache", [{"store": "int4"}, {"allocator": "measured"}])
def test_a_method_with_projections_of_its_own_takes_no_other_store(source, cache):
    with pytest.raises(RecipeError, match="modegpt makes K/V projections of its own"):
        plan(recipe_of("modegpt", kv={"kept": 0.5} | cache), source)
    assert plan(recipe_of("modegpt", kv={"kept": 0.5}), source).projected
