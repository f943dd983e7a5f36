"""Tensor-parallel ranks on CPU give what one gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    KV_HEADS,
    MAX_TOKENS,
    apart,
    assert_only_flips,
    bound,
    compress,
    deviations,
    of,
    planned_times,
    rms,
    run_engines,
    tokens,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.engine

# Of two ranks each has a KV head and the two query heads that read it; of four each has one query
# head, and two hold the same KV head.
PROJECTED = [("post_mixed", 2), ("pre_mixed", 2), ("pre_mixed", 4)]
TIERED = [("post_tiers", 2), ("post_tiers", 4)]
CASES = [*PROJECTED, *TIERED]
APART = "post_grouped"
# Four KV heads in two latents, of which each of two ranks has one.
WEIGHTS = {"weights": {"kept": 1.0}}
GROUPED = {
    "pre": WEIGHTS | {"kv": {"group": 2, "k_kept": 0.5, "v_kept": 0.375}},
    "post": WEIGHTS | {"kv": {"mode": "post", "group": 2, "k_kept": 0.5, "v_kept": 0.375}},
    "tiers": WEIGHTS | {"kv": {"group": 2, "kept": 0.125, "store": "tiers"}},
}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: Any) -> Path:
    return Path(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="session")
def grouped(dense: Path, directory: Path) -> dict[str, Path]:
    """A random model of four KV heads, and that with two of them in a latent."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,  # heads then attend each to something else
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory / "dense")
    AutoTokenizer.from_pretrained(dense).save_pretrained(directory / "dense")
    return {"dense": directory / "dense"} | {
        name: compress(directory / "dense", directory / name, **sections)
        for name, sections in GROUPED.items()
    }


@pytest.fixture(scope="session")
def parallel(compressed: Any, grouped: Any, prompts: Any, directory: Path) -> dict[str, Any]:
    models = [(compressed(name), size, name) for name, size in [*CASES, (APART, 2)]]
    models += [(model, 2, f"grouped_{name}") for name, model in grouped.items()]
    cases = {
        f"{name}_{size}": {
            "model": str(model),
            "prompts": prompts,
            "max_tokens": MAX_TOKENS,
            "rounds": 1,
            "engine": {"tensor_parallel_size": size, "distributed_executor_backend": "mp"},
        }
        for model, size, name in models
    }
    # vLLM takes as many entries as there are ranks.
    return run_engines(directory, cases, VLLM_CPU_OMP_THREADS_BIND=bound(4))


@pytest.mark.parametrize(("name", "size"), PROJECTED)
def test_ranks_give_the_tokens_of_one(engines, parallel, name, size):
    assert tokens(of(parallel, f"{name}_{size}")) == tokens(of(engines, name))


@pytest.mark.parametrize(("name", "size"), TIERED)
def test_ranks_give_the_logprobs_of_one_in_tiers(engines, parallel, same_but_for_flips, name, size):
    one, several = of(engines, name), of(parallel, f"{name}_{size}")
    same_but_for_flips(apart(one, several, "prompt_logprobs"), name)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_ranks_hold_twice_the_tokens(engines, parallel, name, size):
    """Each rank has the KV budget to itself and caches one of the two KV heads."""
    ratio = of(parallel, f"{name}_{size}")["kv_cache_tokens"] / of(engines, name)["kv_cache_tokens"]
    assert ratio == pytest.approx(KV_HEADS, rel=0.01)


def off_the_reference(parallel: Any, grouped: Any, prompts: Any, name: str) -> torch.Tensor:
    return deviations(of(parallel, f"grouped_{name}_2"), grouped[name], prompts)


@pytest.mark.parametrize("name", ["pre", "post"])
def test_ranks_with_a_latent_of_two_heads_give_the_logprobs_of_the_offline_reference(
    parallel, grouped, prompts, name
):
    """To within twice the fp32 noise of two ranks that serve the dense model."""
    noise = rms(off_the_reference(parallel, grouped, prompts, "dense"))
    assert rms(off_the_reference(parallel, grouped, prompts, name)) <= 2 * noise


def test_ranks_with_tiers_of_two_heads_give_the_logprobs_of_the_offline_reference(
    parallel, grouped, prompts
):
    noise = rms(off_the_reference(parallel, grouped, prompts, "dense"))
    dense, tiers = of(parallel, "grouped_dense_2"), of(parallel, "grouped_tiers_2")
    effect = rms(apart(dense, tiers, "prompt_logprobs"))
    differences = off_the_reference(parallel, grouped, prompts, "tiers")
    assert_only_flips(differences, effect, noise, other_library=True)


@pytest.mark.parametrize("name", list(GROUPED))
def test_ranks_hold_as_many_tokens_in_latents_of_two_heads_as_planned(parallel, grouped, name):
    planned = planned_times(grouped[name])
    assert planned > 2
    dense, served = of(parallel, "grouped_dense_2"), of(parallel, f"grouped_{name}_2")
    assert served["kv_cache_tokens"] / dense["kv_cache_tokens"] == pytest.approx(planned, rel=0.02)


def test_ranks_that_would_take_a_latent_apart_are_refused_with_the_reason(parallel, directory):
    """By the workers, into the log: the engine says no more than that they failed."""
    assert "error" in parallel[f"{APART}_2"]
    said = (directory / "log.txt").read_text()
    assert "2 of its 2 KV heads share a latent, which tensor parallel size 2 would take" in said
    assert "Remedy: start vLLM with another --tensor-parallel-size than 2" in said
