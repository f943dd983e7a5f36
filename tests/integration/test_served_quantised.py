"""Weights that others quantised beside our K/V projections, in one checkpoint."""

import json
from typing import Any

import pytest
import torch
from engine_cases import compress, deviations, of, projected, rms, run_engines
from quantised_models import quantised

pytestmark = pytest.mark.engine

METHODS = ["gptq", "awq", "packed", "int8", "fp8"]
EVERYWHERE = "int8"  # vLLM serves it on any CPU
RANKS = [(32, 32), (24, 40), (48, 16), (16, 32), (40, 40), (32, 24)]
MODES = ["pre", "post"]


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
    results |= run_engines(
        root, {f"{n}_{mode}": cases[f"{n}_{mode}"] for n in served for mode in MODES}
    )
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
    result, _ = _of(served, f"{method}_post")
    assert rms(deviations(result, served[method][1], prompts[:4])) > 4 * noise
    totals = json.loads((served[f"{method}_post"][1] / "plan.json").read_text())["totals"]
    planned = totals["kv_bytes_per_token_dense"] / totals["kv_bytes_per_token"]
    ratio = result["kv_cache_tokens"] / served[method][0]["kv_cache_tokens"]
    assert planned > 1.9
    assert ratio == pytest.approx(planned, rel=0.02)


def _of(served: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Result and directory; skips what vLLM cannot serve on this CPU even without projections."""
    method = name.partition("_")[0]
    alone = served[method][0].get("error")
    if alone is not None and method != EVERYWHERE:
        pytest.skip(f"without projections, too, vLLM fails on this CPU: {alone}")
    result, directory = served[name]
    return of({name: result}, name), directory
