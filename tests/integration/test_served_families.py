"""What differs from plain Llama: biases, qk-norm, windows, soft caps, scaled RoPE; as offline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    assert_only_flips,
    compress,
    deviations,
    of,
    projected,
    rms,
    run_engines,
    without_codes,
)

pytestmark = pytest.mark.engine

# Prompts are longer than the context that RoPE is scaled from.
SCALED = {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = SCALED | {"rope_type": "yarn"}  # scales queries and keys, too
PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
# A tiny model each, and what its config.json says beside.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "gemma2": ("gemma2", {"sliding_window": 24}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
}
TIERED = ["gemma2", "llama3", "yarn"]
RANKS = [(16, 24), (32, 8)]


@pytest.fixture(scope="session")
def served(tiny_checkpoint: Any, prompts: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Engine results and directories by case name: a family, then the mode or `dense`."""
    root = tmp_path_factory.mktemp("families")
    directories = {}
    for family, (model, settings) in FAMILIES.items():
        dense = root / f"{family}_dense"
        shutil.copytree(tiny_checkpoint(model), dense)
        config = json.loads((dense / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps(config | settings))
        directories[f"{family}_dense"] = dense
        for mode in ("pre", "post"):
            out = root / f"{family}_{mode}"
            directories[f"{family}_{mode}"] = compress(dense, out, **projected(mode, RANKS, 0.7))
    tiers = {"weights": {"kept": 0.7}, "kv": {"kept": 0.2, "store": "tiers"}}
    equal = projected("post", [(32, 32)] * 2, 0.7)
    for name, sections in (*((f"{n}_tiers", tiers) for n in TIERED), ("gemma2_native", equal)):
        dense = directories[name.partition("_")[0] + "_dense"]
        directories[name] = compress(dense, root / name, **sections)
    cases = {
        name: {"model": str(path), "prompts": prompts[:5], "max_tokens": 8, "rounds": 1}
        for name, path in directories.items()
    }
    cases["gemma2_native"]["without_numba"] = True  # the last
    results = run_engines(root, cases)
    return {name: (results[name], path) for name, path in directories.items()}


def off(served: dict[str, Any], name: str, prompts: Any, *change: Any) -> torch.Tensor:
    """Deviations from the offline reference, to which the change, if any, is made."""
    result, directory = served[name]
    return deviations(of({name: result}, name), directory, prompts[:5], *change)


def noise(served: dict[str, Any], family: str, prompts: Any) -> float:
    """Of fp32, between vLLM and the reference on the dense model."""
    return rms(off(served, f"{family}_dense", prompts))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_logprobs_equal_the_offline_reference(served, prompts, family, mode):
    differences = off(served, f"{family}_{mode}", prompts)
    assert rms(differences) <= 2 * noise(served, family, prompts)


def test_vllms_own_kernel_caps_what_it_reads_of_latents(served, prompts):
    assert served["gemma2_native"][0]["implementations"] == ["CPUAttentionBackendImpl"]
    differences = off(served, "gemma2_native", prompts)
    assert rms(differences) <= 2 * noise(served, "gemma2", prompts)


@pytest.mark.parametrize("family", TIERED)
def test_tiers_are_read_in_windows_under_soft_caps_and_by_scaled_rope(served, prompts, family):
    effect = rms(off(served, f"{family}_tiers", prompts, without_codes))
    differences = off(served, f"{family}_tiers", prompts)
    assert_only_flips(differences, effect, noise(served, family, prompts), other_library=True)


@pytest.mark.parametrize(
    ("family", "setting", "other"),
    [
        ("mistral", "sliding_window", None),
        ("gemma2", "sliding_window", 512),
        ("gemma2", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("llama3", "rope_parameters", PLAIN),
        ("yarn", "rope_parameters", PLAIN),
        ("yarn", "rope_parameters", YARN | {"attention_factor": 1.0}),
    ],
)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_windows_soft_caps_and_scaled_rope_matter(served, prompts, mode, family, setting, other):
    """Without it the reference is far from what was served."""
    _, directory = served[f"{family}_{mode}"]
    config = Path(directory) / "config.json"
    as_served = config.read_text()
    exact = off(served, f"{family}_{mode}", prompts).abs().max()
    try:
        config.write_text(json.dumps(json.loads(as_served) | {setting: other}))
        assert off(served, f"{family}_{mode}", prompts).abs().max() > 100 * exact
    finally:
        config.write_text(as_served)
