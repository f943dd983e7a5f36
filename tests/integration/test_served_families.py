"""Families that differ from Llama: biases, qk-norm, sliding windows; served and offline alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import compress, deviations, of, projected, run_engines

pytestmark = pytest.mark.engine

FAMILIES = ["qwen2", "qwen3", "mistral"]
RANKS = [(16, 24), (32, 8)]
WINDOW = 24


@pytest.fixture(scope="session")
def served(tiny_checkpoint: Any, prompts: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Engine results and directories by case name: a family, then the mode or `dense`."""
    root = tmp_path_factory.mktemp("families")
    directories = {}
    for family in FAMILIES:
        dense = root / f"{family}_dense"
        shutil.copytree(tiny_checkpoint(family), dense)
        if family == "mistral":
            config = json.loads((dense / "config.json").read_text())
            (dense / "config.json").write_text(json.dumps(config | {"sliding_window": WINDOW}))
        directories[f"{family}_dense"] = dense
        for mode in ("pre", "post"):
            out = root / f"{family}_{mode}"
            directories[f"{family}_{mode}"] = compress(dense, out, **projected(mode, RANKS, 0.7))
    cases = {
        name: {"model": str(path), "prompts": prompts[:5], "max_tokens": 8, "rounds": 1}
        for name, path in directories.items()
    }
    results = run_engines(root, cases)
    return {name: (results[name], path) for name, path in directories.items()}


def rms(served: dict[str, Any], name: str, prompts: list[list[int]]) -> torch.Tensor:
    result, directory = served[name]
    of({name: result}, name)
    return deviations(result, directory, prompts[:5]).square().mean().sqrt()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_logprobs_equal_the_offline_reference(served, prompts, family, mode):
    assert rms(served, f"{family}_{mode}", prompts) <= 2 * rms(served, f"{family}_dense", prompts)


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_the_window_matters(served, prompts, mode):
    """Without its sliding window the reference is far from what was served."""
    result, directory = served[f"mistral_{mode}"]
    config = Path(directory) / "config.json"
    windowed = config.read_text()
    noise = deviations(result, directory, prompts[:5]).abs().max()
    try:
        config.write_text(json.dumps(json.loads(windowed) | {"sliding_window": None}))
        assert deviations(result, directory, prompts[:5]).abs().max() > 100 * noise
    finally:
        config.write_text(windowed)
