"""Every method, from a dense model to a checkpoint that is what was planned and measured."""

import math

import pytest
import torch
from runs import IDLE, fine_tuned, recipe_for, tensors_of, with_idle_expert

from offline_compress import reference
from offline_compress.checkpoint import inspect
from offline_compress.evaluation import perplexity
from offline_compress.methods import METHODS
from offline_compress.pipeline import compress
from offline_compress.preflight import prepare_run
from vllm_svd.format import verify

CASES = [
    *((method, "llama") for method in METHODS),
    *(
        (method, family)
        for method in ("svd_llm", "gptvq", "fwsvd")
        for family in ("gemma2", "qwen2", "qwen3", "qwen3_moe")
    ),
    *(("auto", family) for family in ("gemma2", "qwen2")),
    *((method, "qwen3_moe") for method in ("auto", "gfwsvd", "dobi_svd")),
    *(("modegpt", family) for family in ("gemma2", "qwen2", "qwen3")),
]
# Fewer rounds of the same steps.
OPTIONS = {"gptvq": {"em_iterations": 5, "update_steps": 3, "sweeps": 1}}


@pytest.fixture(scope="module")
def model_of(noisy_checkpoint, tmp_path_factory):
    """Random weights that matter; one expert of the mixture gets no token."""
    idle = tmp_path_factory.mktemp("models") / "idle"

    def model(family):
        if family != "qwen3_moe":
            return noisy_checkpoint(family)
        return idle if idle.exists() else with_idle_expert(noisy_checkpoint(family), idle)

    return model


@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_checkpoint_is_what_was_planned_and_measured(
    method, family, model_of, short_text, tmp_path
):
    model, base = model_of(family), None
    options = {"name": method} | OPTIONS.get(method, {})
    if method == "impart":
        base, model = model, fine_tuned(model, tmp_path / "tuned")
        options["base"] = str(base)
    recipe = recipe_for(short_text, options)
    corpus = prepare_run(recipe, str(model), tmp_path / "out").corpus
    measured = compress(recipe, str(model), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "tuned"}  # no work directory

    out = tmp_path / "out"
    config, plan = verify(out), inspect(out).plan
    assert config.method == method
    assert config.modules == plan.compressed and len(config.modules) > 0
    # A layer of modegpt with qk-norm cannot shrink queries and keys, and says so.
    warned = any("the least that modegpt can make" in warning for warning in plan.warnings)
    assert plan.totals.linear_kept <= 0.5 or ((method, family) == ("modegpt", "qwen3") and warned)
    for path in out.iterdir():  # nothing tells where it was made
        assert str(tmp_path.parent).encode() not in path.read_bytes()
    payload = sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert payload == plan.totals.checkpoint_bytes

    network = reference.load(out, "cpu", torch.float32, base)
    found = perplexity(network, corpus.held_out, 64, 4, corpus.bos)
    assert found.perplexity == pytest.approx(measured.perplexity, rel=1e-6)
    assert found.tokens == measured.scored_tokens
    lost = abs(math.log(measured.perplexity / measured.perplexity_dense))
    assert lost > 1e-3 and measured.kl_to_dense > 1e-3
    for path, error in measured.matrices.items():
        assert math.isfinite(error.predicted) and math.isfinite(error.damping)
        assert (error.held_out == 0) == path.startswith(IDLE)
