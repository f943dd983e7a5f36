"""Families that differ from Llama: biases, qk-norm, windows, soft caps; served as offline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import compress, deviations, of, projected, run_engines

pytestmark = pytest.mark.engine

FAMILIES = ["qwen2", "qwen3", "mistral", "gemma2"]
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
        if family in ("mistral", "gemma2"):
            config = json.loads((dense / "config.json").read_text())
            (dense / "config.json").write_text(json.dumps(config | {"sliding_window": WINDOW}))
        directories[f"{family}_dense"] = dense
        for mode in ("pre", "post"):
            out = root / f"{family}_{mode}"
            directories[f"{family}_{mode}"] = compress(dense, out, **projected(mode, RANKS, 0.7))
    native = directories["gemma2_native"] = root / "gemma2_native"
    compress(directories["gemma2_dense"], native, **projected("post", [(32, 32)] * 2, 0.7))
    cases = {
        name: {"model": str(path), "prompts": prompts[:5], "max_tokens": 8, "rounds": 1}
        for name, path in directories.items()
    }
    cases["gemma2_native"]["without_numba"] = True  # the last
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


def test_vllms_own_kernel_caps_what_it_reads_of_latents(served, prompts):
    assert served["gemma2_native"][0]["implementations"] == ["CPUAttentionBackendImpl"]
    assert rms(served, "gemma2_native", prompts) <= 2 * rms(served, "gemma2_dense", prompts)


@pytest.mark.parametrize(
    ("family", "setting", "other"),
    [
        ("mistral", "sliding_window", None),
        ("gemma2", "sliding_window", 512),
        ("gemma2", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
    ],
)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_windows_and_soft_caps_matter(served, prompts, mode, family, setting, other):
    """Without it the reference is far from what was served."""
    result, directory = served[f"{family}_{mode}"]
    config = Path(directory) / "config.json"
    as_served = config.read_text()
    noise = deviations(result, directory, prompts[:5]).abs().max()
    try:
        config.write_text(json.dumps(json.loads(as_served) | {setting: other}))
        assert deviations(result, directory, prompts[:5]).abs().max() > 100 * noise
    finally:
        config.write_text(as_served)
