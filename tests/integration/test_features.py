"""Features of vLLM that change what a step holds, with a projected cache and one of tiers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    LAYERS,
    MAX_TOKENS,
    apart,
    bound,
    deviations,
    of,
    planned_times,
    run_engines,
    tokens,
)
from safetensors.torch import save_file

pytestmark = pytest.mark.engine

NAMES = ["pre_half", "pre_tiers"]
# What is drafted for, by what, and the part of drafts that is right at least: a model agrees with
# itself, and mostly with its compressed form.
DRAFTS = [
    *((name, "speculative", 0.0) for name in NAMES),
    *((name, "drafted", 0.9) for name in NAMES),
    ("dense", "drafted", 0.5),
]
RANK = 4
TARGETS = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256)}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the attention layers, in the layout of peft."""
    directory, g = tmp_path_factory.mktemp("lora"), torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for target, (rows, columns) in TARGETS.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=g) / 16
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=g) / 16
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*TARGETS]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def features(
    dense: Path, compressed: Any, prompts: Any, adapter: Path, tmp_path_factory: Any
) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("features")
    cases: dict[str, Any] = {}
    for name in NAMES:
        case = {"model": str(compressed(name)), "prompts": prompts, "max_tokens": MAX_TOKENS}
        case |= {"rounds": 1, "prompt_logprobs": False}
        drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
        cases[f"{name}_speculative"] = case | {"engine": {"speculative_config": drafts}}
        itself = {"method": "draft_model", "model": case["model"], "num_speculative_tokens": 3}
        cases[f"{name}_drafted"] = case | {"engine": {"speculative_config": itself}}
        lora = {"enable_lora": True, "max_lora_rank": 8}
        # vLLM 0.32 fails on a CPU when it is asked for an adapter and log-probabilities of prompts.
        cases[f"{name}_lora"] = case | {"engine": lora, "lora": str(adapter)}
        connector = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(directory / name)},
        }
        for part in ("saved", "loaded"):
            cases[f"{name}_{part}"] = case | {"engine": {"kv_transfer_config": connector}}
        # On a CPU vLLM 0.32 makes the buffers between stages while it warms up, which it does for
        # traced models only, whatever compiles them.
        traced = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}
        stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
        stages |= {"enforce_eager": False, "compilation_config": traced}
        cases[f"{name}_stages"] = case | {"engine": stages, "prompt_logprobs": True}
    cases["dense_drafted"] = cases["pre_tiers_drafted"] | {"model": str(dense)}
    return run_engines(directory, cases, VLLM_CPU_OMP_THREADS_BIND=bound(2))


def add(adapter: Path, network: torch.nn.Module) -> None:
    """Merge the adapter into the weights."""
    from safetensors.torch import load_file

    parts = load_file(adapter / "adapter_model.safetensors")
    for name, down in parts.items():
        if "lora_A" in name:
            up = parts[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            network.get_submodule(path).weight.data += up @ down


@pytest.mark.parametrize(("name", "by", "least"), DRAFTS)
def test_verified_drafts_change_no_token(engines, features, name, by, least):
    """Steps then hold several query tokens of a request.

    Drafts are n-grams or those of a model, here itself, or for the dense one the one with tiers.
    """
    served = of(features, f"{name}_{by}")
    assert served["accepted_drafts"] > least * served["drafts"]
    assert tokens(served) == tokens(of(engines, name))


def test_a_compressed_draft_model_takes_the_part_of_the_cache_it_was_planned(
    engines, features, compressed
):
    part = 1 / planned_times(compressed("pre_tiers"))
    served, alone = of(features, "dense_drafted"), of(engines, "dense")
    ratio = served["kv_cache_tokens"] / alone["kv_cache_tokens"]
    assert ratio == pytest.approx(1 / (1 + part), rel=0.01)


def test_an_adapter_is_added_to_what_is_projected(
    features, compressed, prompts, adapter, dense_deviation
):
    name = "pre_half"
    merged = deviations(
        of(features, f"{name}_lora"), compressed(name), prompts, lambda n: add(adapter, n)
    )
    assert merged.square().mean().sqrt() <= 2 * dense_deviation
    alone = deviations(of(features, f"{name}_lora"), compressed(name), prompts)
    assert alone.square().mean().sqrt() > 100 * dense_deviation


def test_an_adapter_is_added_to_what_tiers_hold(
    features, compressed, prompts, adapter, same_but_for_flips
):
    name = "pre_tiers"
    served = of(features, f"{name}_lora")
    merged = deviations(served, compressed(name), prompts, lambda n: add(adapter, n))
    same_but_for_flips(merged, name)


@pytest.mark.parametrize("name", NAMES)
def test_pages_that_a_connector_saved_are_those_of_another_engine(engines, features, name):
    saved, loaded = of(features, f"{name}_saved"), of(features, f"{name}_loaded")
    assert sum(request["cached_tokens"] for request in loaded["rounds"][0]) > 128
    assert tokens(loaded) == tokens(saved) == tokens(of(engines, name))


def test_stages_of_a_pipeline_change_nothing(engines, features):
    served = of(features, "pre_half_stages")
    assert tokens(served) == tokens(of(engines, "pre_half"))
    # Each stage has the KV budget to itself and caches half the layers.
    ratio = served["kv_cache_tokens"] / of(engines, "pre_half")["kv_cache_tokens"]
    assert ratio == pytest.approx(2.0, rel=0.01)


def test_stages_of_a_pipeline_change_no_more_than_a_code(engines, features, same_but_for_flips):
    name = "pre_tiers"
    served = of(features, f"{name}_stages")
    same_but_for_flips(apart(of(engines, name), served, "prompt_logprobs"), name)
