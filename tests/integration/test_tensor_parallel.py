"""Two tensor-parallel ranks on CPU give what one gives."""

from typing import Any

import pytest
from engine_cases import MAX_TOKENS, MIXED, apart, of, run_engines, tokens

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def parallel(compressed: Any, prompts: Any, tmp_path_factory: Any) -> dict[str, Any]:
    cases = {
        name: {
            "model": str(compressed(name)),
            "prompts": prompts,
            "max_tokens": MAX_TOKENS,
            "rounds": 1,
            "engine": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        }
        for name in [*MIXED, "post_tiers"]
    }
    directory = tmp_path_factory.mktemp("parallel")
    return run_engines(directory, cases, VLLM_CPU_OMP_THREADS_BIND="0|1")


@pytest.mark.parametrize("name", MIXED)
def test_two_ranks_give_the_tokens_of_one(engines, parallel, name):
    assert tokens(of(parallel, name)) == tokens(of(engines, name))


def test_two_ranks_give_the_logprobs_of_one_in_tiers(engines, parallel, same_but_for_flips):
    one, two = of(engines, "post_tiers"), of(parallel, "post_tiers")
    same_but_for_flips(apart(one, two, "prompt_logprobs"), "post_tiers")


@pytest.mark.parametrize("name", [*MIXED, "post_tiers"])
def test_two_ranks_hold_twice_the_tokens(engines, parallel, name):
    """Each rank has the KV budget to itself and caches one of the two KV heads."""
    ratio = of(parallel, name)["kv_cache_tokens"] / of(engines, name)["kv_cache_tokens"]
    assert ratio == pytest.approx(2.0, rel=0.01)
