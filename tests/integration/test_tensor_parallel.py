"""Tensor-parallel ranks on CPU give what one gives."""

from pathlib import Path
from typing import Any

import pytest
from engine_cases import KV_HEADS, MAX_TOKENS, apart, bound, of, run_engines, tokens

pytestmark = pytest.mark.engine

# Of two ranks each has a KV head and the two query heads that read it; of four each has one query
# head, and two hold the same KV head.
PROJECTED = [("post_mixed", 2), ("pre_mixed", 4)]
TIERED = [("post_tiers", 2), ("post_tiers", 4)]
CASES = [*PROJECTED, *TIERED]
GROUPED = "post_grouped"


@pytest.fixture(scope="session")
def directory(tmp_path_factory: Any) -> Path:
    return Path(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="session")
def parallel(compressed: Any, prompts: Any, directory: Path) -> dict[str, Any]:
    cases = {
        f"{name}_{size}": {
            "model": str(compressed(name)),
            "prompts": prompts,
            "max_tokens": MAX_TOKENS,
            "rounds": 1,
            "engine": {"tensor_parallel_size": size, "distributed_executor_backend": "mp"},
        }
        for name, size in [*CASES, (GROUPED, 2)]
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


def test_ranks_that_would_take_a_latent_apart_are_refused_with_the_reason(parallel, directory):
    """By the workers, into the log: the engine says no more than that they failed."""
    assert "error" in parallel[f"{GROUPED}_2"]
    said = (directory / "log.txt").read_text()
    assert "2 of its 2 KV heads share a latent, which tensor parallel size 2 would take" in said
    assert "Remedy: start vLLM with another --tensor-parallel-size than 2" in said
