"""Weights that others quantised beside our K/V projections, in one checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import compress, deviations, of, planned_times, projected, rms, run_engines
from quantised_models import quantised

pytestmark = pytest.mark.engine

METHODS = ["gptq", "awq", "packed", "int8", "fp8"]
EVERYWHERE = "int8"  # vLLM serves it on any CPU
RANKS = [(32, 32), (24, 40), (48, 16), (16, 32), (40, 40), (32, 24)]
MODES = ["pre", "post"]
TIERS = {"weights": {"kept": 1.0}, "kv": {"mode": "post", "kept": 0.25, "store": "tiers"}}


@pytest.fixture(scope="module")
def served(dense: Any, prompts: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Engine results and directories by case name: a method, then the mode where projected."""
    root = tmp_path_factory.mktemp("quantised")
    directories = {}
    for method in METHODS:
        model = directories[method] = quantised(dense, root / method, method, torch.bfloat16)
        for mode in MODES:
            name = f"{method}_{mode}"
            directories[name] = compress(model, root / name, **projected(mode, RANKS, 1.0))
    for method in METHODS:
        tiers = f"{method}_tiers"
        directories[tiers] = compress(directories[method], root / tiers, **TIERS)
    cases = {
        name: {
            "model": str(path),
            "prompts": prompts[:4],
            "max_tokens": 8,
            "rounds": 1,
            "engine": {"dtype": "bfloat16"},
        }
        for name, path in directories.items()
    }
    results = run_engines(root, {name: cases[name] for name in METHODS})
    served = [name for name in METHODS if name == EVERYWHERE or "error" not in results[name]]
    projecting = [f"{n}_{kind}" for n in served for kind in (*MODES, "tiers")]
    drafting, itself = f"{EVERYWHERE}_drafting", directories[f"{EVERYWHERE}_post"]
    directories[drafting] = itself
    drafts = {"method": "draft_model", "model": str(itself), "num_speculative_tokens": 3}
    engine = {"dtype": "bfloat16", "speculative_config": drafts}
    plain = cases[f"{EVERYWHERE}_post"]
    cases[drafting] = plain | {"engine": engine, "prompt_logprobs": False, "max_tokens": 24}
    projecting.append(drafting)
    results |= run_engines(root, {name: cases[name] for name in projecting})
    return {name: (result, directories[name]) for name, result in results.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_as_near_to_the_offline_reference_as_without_projections(
    served, prompts, method, mode
):
    """The reference multiplies the dense weights that the quantised ones stand for."""
    noise = rms(deviations(*_of(served, method), prompts[:4]))
    assert rms(deviations(*_of(served, f"{method}_{mode}"), prompts[:4])) <= 2 * noise


@pytest.mark.parametrize("method", METHODS)
def test_the_projections_are_served(served, prompts, method):
    """The reference without them is another model."""
    noise = rms(deviations(*_of(served, method), prompts[:4]))
    result, directory = _of(served, f"{method}_post")
    assert rms(deviations(result, served[method][1], prompts[:4])) > 4 * noise
    assert _times_the_tokens(served, method, result, directory) > 1.9


@pytest.mark.parametrize("method", METHODS)
def test_tiers_are_served_beside_quantised_weights(served, prompts, method):
    """As above, with room for the codes that the noise flips."""
    noise = rms(deviations(*_of(served, method), prompts[:4]))
    result, directory = _of(served, f"{method}_tiers")
    assert rms(deviations(result, directory, prompts[:4])) <= 3 * noise
    assert rms(deviations(result, served[method][1], prompts[:4])) > 4 * noise
    assert _times_the_tokens(served, method, result, directory) > 3.9


def test_a_quantised_model_drafts_for_itself(served):
    """Layers that its config leaves dense are so under the root of drafts, too."""
    result, directory = _of(served, f"{EVERYWHERE}_drafting")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert any("down_proj" in name for name in config["weights"]["ignore"])
    assert result["accepted_drafts"] > 0.75 * result["drafts"]  # bf16 breaks ties either way


def _times_the_tokens(served: dict[str, Any], method: str, result: Any, directory: Path) -> float:
    """How many times the tokens of dense caches, of which as many as planned are there."""
    planned = planned_times(directory)
    ratio = result["kv_cache_tokens"] / served[method][0]["kv_cache_tokens"]
    assert ratio == pytest.approx(planned, rel=0.02)
    return planned


def _of(served: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Result and directory; skips what vLLM cannot serve on this CPU even without projections."""
    method = name.partition("_")[0]
    alone = served[method][0].get("error")
    if alone is not None and method != EVERYWHERE:
        pytest.skip(f"without projections, too, vLLM fails on this CPU: {alone}")
    result, directory = served[name]
    return of({name: result}, name), directory
