"""Real vLLM on CPU: what it computes, what it caches, and under which of its features.

All engines run in fp32 in one worker process; every test reads its results.
"""

import json

import pytest
from engine_cases import (
    ARTEFACTS,
    GROUPED,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    MIXED,
    MIXED_RANKS,
    NAMES,
    deviations,
    of,
    tokens,
)

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["weights_full", "pre_full", "post_full"])
def test_full_rank_gives_the_tokens_of_dense(engines, name):
    assert tokens(of(engines, name)) == tokens(of(engines, "dense"))


@pytest.fixture(scope="session")
def dense_deviation(engines, dense, prompts) -> float:
    """How far two fp32 implementations of the same dense model differ (RMS)."""
    return float(deviations(of(engines, "dense"), dense, prompts).square().mean().sqrt())


@pytest.mark.parametrize(
    "name", ["weights_full", *GROUPED, *MIXED, "pre_half", "post_half", *ARTEFACTS]
)
def test_logprobs_equal_the_offline_reference(engines, compressed, prompts, dense_deviation, name):
    """To within twice the fp32 noise between vLLM and transformers on the dense model."""
    difference = deviations(of(engines, name), compressed(name), prompts)
    assert difference.square().mean().sqrt() <= 2 * dense_deviation


@pytest.mark.parametrize("name", [*GROUPED, *MIXED, *ARTEFACTS])
def test_compression_is_not_a_no_op(engines, name):
    dense = of(engines, "dense")["rounds"][0][3]["prompt_logprobs"]
    served = of(engines, name)["rounds"][0][3]["prompt_logprobs"]
    assert max(abs(a - b) for a, b in zip(dense, served, strict=True)) > 0.05


@pytest.mark.parametrize("name", ["pre_half", "post_half", "reduced"])
def test_half_the_channels_hold_twice_the_tokens(engines, name):
    ratio = of(engines, name)["kv_cache_tokens"] / of(engines, "dense")["kv_cache_tokens"]
    assert ratio == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("name", GROUPED)
def test_a_quarter_of_the_channels_holds_four_times_the_tokens(engines, name):
    ratio = of(engines, name)["kv_cache_tokens"] / of(engines, "dense")["kv_cache_tokens"]
    assert ratio == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("name", MIXED)
def test_per_layer_ranks_take_the_planned_bytes(engines, compressed, name):
    """No padding between layers: tokens in the cache are inverse to planned bytes per token."""
    planned = json.loads((compressed(name) / "plan.json").read_text())["totals"]
    channels = KV_HEADS * sum(k + v for k, v in MIXED_RANKS)
    assert planned["kv_bytes_per_token"] == 4 * channels
    assert planned["kv_bytes_per_token_dense"] == 4 * LAYERS * KV_HEADS * 2 * HEAD_DIM
    served, dense = of(engines, name), of(engines, "dense")
    budget = dense["num_blocks"] * planned["kv_bytes_per_token_dense"] * dense["block_size"]
    block = planned["kv_bytes_per_token"] * served["block_size"]
    assert served["num_blocks"] == pytest.approx(budget / block, rel=0.01)


@pytest.mark.parametrize("name", ["dense", *NAMES, *GROUPED, *MIXED])
def test_prefix_cache_is_used_and_changes_nothing(engines, name):
    result = of(engines, name)
    assert sum(request["cached_tokens"] for request in result["rounds"][1]) > 128
    assert tokens(result, 1) == tokens(result)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("feature", ["chunked", "full_pool", "compiled"])
def test_features_of_vllm_change_nothing(engines, dense_deviation, name, feature):
    plain, served = of(engines, name), of(engines, f"{name}_{feature}")
    assert tokens(served) == tokens(plain)
    differences = [
        a - b
        for first, second in zip(plain["rounds"][0], served["rounds"][0], strict=True)
        for kind in ("prompt_logprobs", "logprobs")
        for a, b in zip(first[kind], second[kind], strict=True)
    ]
    rms = (sum(d * d for d in differences) / len(differences)) ** 0.5
    assert rms <= 2 * dense_deviation


@pytest.mark.parametrize("name", MIXED)
def test_the_full_pool_preempted(engines, name):
    assert of(engines, f"{name}_full_pool")["preemptions"] > 0


@pytest.mark.parametrize("name", MIXED)
def test_bf16_is_as_close_as_dense_bf16(engines, name):
    """Rounding activations and cache to bf16 costs at most twice what it costs dense."""

    def rounding(model: str) -> float:
        exact, rounded = of(engines, model), of(engines, f"{model}_bf16")
        differences = [
            a - b
            for first, second in zip(exact["rounds"][0], rounded["rounds"][0], strict=True)
            for a, b in zip(first["prompt_logprobs"], second["prompt_logprobs"], strict=True)
        ]
        return (sum(d * d for d in differences) / len(differences)) ** 0.5

    assert rounding(name) <= 2 * rounding("dense")
