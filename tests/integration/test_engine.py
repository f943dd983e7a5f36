"""Real vLLM on CPU: what it computes, what it caches, and under which of its features.

All engines run in fp32 in one worker process; every test reads its results.
"""

import json

import pytest
from engine_cases import (
    ARTEFACTS,
    BEAMS,
    CHUNKS,
    GROUPED,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    MIXED,
    MIXED_RANKS,
    NAMES,
    STORES,
    TIERED,
    apart,
    assert_only_flips,
    deviations,
    of,
    planned_times,
    rms,
    tokens,
    warm,
    without_codes,
)

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["weights_full", "pre_full", "post_full"])
def test_full_rank_gives_the_tokens_of_dense(engines, name):
    assert tokens(of(engines, name)) == tokens(of(engines, "dense"))


@pytest.mark.parametrize(
    "name", ["weights_full", *GROUPED, *MIXED, "pre_half", "post_half", *ARTEFACTS]
)
def test_logprobs_equal_the_offline_reference(engines, compressed, prompts, dense_deviation, name):
    """To within twice the fp32 noise between vLLM and transformers on the dense model."""
    difference = deviations(of(engines, name), compressed(name), prompts)
    assert difference.square().mean().sqrt() <= 2 * dense_deviation


def test_the_native_kernel_gives_the_logprobs_of_ours(engines, dense_deviation):
    """Where numba is missing vLLM's own kernel serves equal ranks of mode post."""
    ours, native = of(engines, "post_half"), of(engines, "post_half_native")
    assert ours["implementations"] == ["ProjectingImpl"]
    assert native["implementations"] == ["CPUAttentionBackendImpl"]
    assert native["kv_cache_tokens"] == ours["kv_cache_tokens"]
    assert tokens(native) == tokens(native, 1) == tokens(ours)
    assert rms(apart(ours, native, "prompt_logprobs", "logprobs")) <= 2 * dense_deviation


@pytest.mark.parametrize("name", TIERED)
def test_tiers_give_the_logprobs_of_the_offline_reference(
    engines, compressed, prompts, same_but_for_flips, name
):
    differences = deviations(of(engines, name), compressed(name), prompts)
    same_but_for_flips(differences, name, other_library=True)


@pytest.mark.parametrize("store", STORES)
def test_a_store_gives_the_logprobs_of_the_offline_reference(
    engines, compressed, prompts, dense_deviation, store
):
    """Against what the codes of this very store change, not what fewer channels do beside."""
    served, model = of(engines, store), compressed(store)
    effect = rms(deviations(served, model, prompts, without_codes))
    differences = deviations(served, model, prompts)
    assert_only_flips(differences, effect, dense_deviation, other_library=True)


@pytest.mark.parametrize("name", [*GROUPED, *MIXED, *TIERED, *ARTEFACTS])
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


@pytest.mark.parametrize(
    ("name", "least"), [("pre_tiers", 16), ("post_tiers", 8), *((store, 10) for store in STORES)]
)
def test_codes_hold_as_many_tokens_as_planned(engines, compressed, name, least):
    planned = planned_times(compressed(name))
    assert planned >= least
    ratio = of(engines, name)["kv_cache_tokens"] / of(engines, "dense")["kv_cache_tokens"]
    assert ratio == pytest.approx(planned, rel=0.02)


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


@pytest.mark.parametrize("name", ["dense", *NAMES, *GROUPED, *MIXED, *TIERED])
def test_prefix_cache_is_used_and_changes_nothing(
    engines, dense_deviation, same_but_for_flips, name
):
    result = of(engines, name)
    assert sum(request["cached_tokens"] for request in result["rounds"][1]) > 128
    assert tokens(result, 1) == tokens(result)
    differences = apart(result, warm(result), "logprobs")
    if name in TIERED:
        same_but_for_flips(differences, name)
    else:
        assert rms(differences) <= 2 * dense_deviation


FEATURES = ["full_pool", "compiled", *(f"chunks_of_{chunk}" for chunk in CHUNKS)]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_vllm_change_nothing(engines, dense_deviation, name, feature):
    plain, served = of(engines, name), of(engines, f"{name}_{feature}")
    assert tokens(served) == tokens(plain)
    differences = apart(plain, served, "prompt_logprobs", "logprobs")
    assert rms(differences) <= 2 * dense_deviation


@pytest.mark.parametrize("name", TIERED)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_vllm_change_no_more_than_a_code(engines, same_but_for_flips, name, feature):
    plain, served = of(engines, name), of(engines, f"{name}_{feature}")
    same_but_for_flips(apart(plain, served, "prompt_logprobs"), name)


@pytest.mark.parametrize("name", [*MIXED, *TIERED])
def test_the_full_pool_preempted(engines, name):
    """In each round, of which the other tests compare one."""
    assert min(of(engines, f"{name}_full_pool")["preemptions"]) > 0


@pytest.mark.parametrize("name", [*MIXED, *TIERED])
def test_a_warm_cache_in_a_full_pool_changes_nothing(
    engines, dense_deviation, same_but_for_flips, name
):
    """Or, in tiers, no more than a code.

    The last prompt is the first of the second round: what it finds was cached in the first one.
    """
    roomy, full = of(engines, name), of(engines, f"{name}_full_pool")
    assert full["rounds"][1][-1]["cached_tokens"] > 128
    assert tokens(full, 1) == tokens(roomy, 1)
    differences = apart(warm(roomy), warm(full), "logprobs")
    if name in TIERED:
        same_but_for_flips(differences, name)
    else:
        assert rms(differences) <= 2 * dense_deviation


@pytest.mark.parametrize(
    ("name", "feature"), [*((name, "bf16") for name in MIXED), ("post_mixed", "bf16_compiled")]
)
def test_bf16_is_as_close_as_dense_bf16(engines, name, feature):
    """Rounding activations and cache to bf16 costs at most twice what it costs dense.

    Compiled, a graph widens weights for prompts and not for one token, where the CPU emulates.
    """

    def rounding(model: str, feature: str) -> float:
        return rms(apart(of(engines, model), of(engines, f"{model}_{feature}"), "prompt_logprobs"))

    assert rounding(name, feature) <= 2 * rounding("dense", "bf16")


@pytest.mark.parametrize("name", TIERED)
def test_bf16_costs_tiers_no_likelihood(engines, name):
    """Codes may flip either way; on average over the tokens that cancels."""
    lost = apart(of(engines, name), of(engines, f"{name}_bf16"), "prompt_logprobs").mean()
    assert lost <= rms(apart(of(engines, "dense"), of(engines, "dense_bf16"), "prompt_logprobs"))


@pytest.mark.parametrize("name", BEAMS)
def test_beams_are_more_likely_than_greedy_tokens(engines, name):
    result = of(engines, name)
    assert all(len(set(beams)) == 3 for beams in result["beams"])
    best = sum(max(beams) for beams in result["beams"])
    assert best > sum(sum(request["logprobs"]) for request in result["rounds"][0])


def test_fp8_of_vllm_costs_latents_what_it_costs_dense_caches(engines):
    """Mode post with equal ranks rides vLLM's own kernel."""
    if "AVX-512" in engines["dense_fp8"].get("error", ""):
        pytest.skip("without projections, too, vLLM has no fp8 cache on this CPU")
    fp8 = of(engines, "post_half_fp8")
    assert fp8["implementations"] == ["CPUAttentionBackendImpl"]

    def rounding(name: str) -> float:
        return rms(apart(of(engines, name), of(engines, f"{name}_fp8"), "prompt_logprobs"))

    assert 0 < rounding("post_half") <= 2 * rounding("dense")
    assert fp8["kv_cache_tokens"] == pytest.approx(
        4 * of(engines, "post_half")["kv_cache_tokens"], rel=0.01
    )


@pytest.mark.parametrize("dtype", ["fp8", "int8_per_token_head"])
def test_other_cache_dtypes_are_refused_with_the_reason(engines, dtype):
    said = engines[dtype]["error"]
    assert f"K/V projections do not work with KV cache dtype {dtype}" in said
    assert "--kv-store" in said
