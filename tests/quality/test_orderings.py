"""On the example model the methods rank as theory says, and K/V projections cost what they should.

Held-out windows at the end of the WikiText-2 test slice, calibrated on other windows of it.
"""

from pathlib import Path

import pytest

from offline_compress.checkpoint import inspect
from offline_compress.pipeline import compress
from offline_compress.recipe import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXT = EXAMPLES / "wikitext-2" / "train.txt"
DENSE_KV = 6 * 2 * 2 * 64 * 2  # layers, K and V, heads, channels, bytes


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a recipe was measured to lose, and the bytes it took, each recipe compressed once."""
    found = {}

    def measured(method, kept, allocator=None, cache=None):
        key = (method, kept, allocator, str(cache))
        if key not in found:
            recipe = parse(
                {
                    "weights": {"method": method, "kept": kept, "allocator": allocator},
                    "kv": cache or {"kept": None},
                    "calibration": {"text": str(TEXT), "samples": 32},
                    "evaluation": {"samples": 16},
                },
                "the test",
            )
            out = tmp_path_factory.mktemp("run") / "out"
            compress(recipe, str(EXAMPLES / "wiki-llama-s"), out)
            found[key] = inspect(out)
        return found[key]

    return measured


@pytest.mark.parametrize("baseline", ["svd", "asvd", "fwsvd"])
def test_whitening_beats_the_baselines(measured, baseline):
    whitened, scaled = (measured(name, 0.4).measured for name in ("svd_llm", baseline))
    assert whitened.perplexity < scaled.perplexity
    assert whitened.kl_to_dense < scaled.kl_to_dense


@pytest.mark.parametrize(
    ("method", "allocator"), [("svd_llm_v2", "truncation_loss"), ("svd_llm", "water_filling")]
)
def test_ranks_by_loss_beat_uniform_ones_in_no_more_bytes(measured, method, allocator):
    uniform, found = measured("svd_llm", 0.4), measured(method, 0.4, allocator=allocator)
    assert found.plan.totals.linear_kept <= 0.4
    assert found.measured.perplexity < uniform.measured.perplexity
    assert found.measured.kl_to_dense < uniform.measured.kl_to_dense


def test_heads_that_share_a_latent_lose_less_in_the_same_bytes(measured):
    alone, shared = (
        measured("svd_llm", 1.0, cache={"kept": 0.25, "group": group}) for group in (1, 2)
    )
    totals = [found.plan.totals.kv_bytes_per_token for found in (alone, shared)]
    assert totals == [DENSE_KV // 4] * 2
    assert shared.measured.kl_to_dense < alone.measured.kl_to_dense / 2


def test_auto_beats_low_rank_and_codebooks_in_no_more_bytes(measured):
    auto = measured("auto", 0.2)
    for name in ("svd_llm", "gptvq"):
        other = measured(name, 0.2)
        assert auto.plan.totals.linear_bytes <= 0.2 * auto.plan.totals.linear_bytes_dense
        assert auto.measured.kl_to_dense < other.measured.kl_to_dense
        assert auto.measured.perplexity < other.measured.perplexity


def test_half_of_the_kv_channels_before_rope(measured):
    """At most 0.2 % of perplexity, and less than the same channels after RoPE cost."""
    caches = [{"kept": 0.5, "mode": mode} for mode in ("pre", "post")]
    pre, post = (measured("svd_llm", 1.0, cache=cache) for cache in caches)
    before, after = pre.measured, post.measured
    assert before.perplexity <= 1.002 * before.perplexity_dense
    assert before.kl_to_dense < after.kl_to_dense
    assert pre.plan.totals.kv_bytes_per_token == DENSE_KV // 2


@pytest.mark.parametrize(("kept", "most"), [(0.125, 0.01), (0.0625, 0.04)])
def test_tiers_at_an_eighth_and_a_sixteenth_of_the_bytes(measured, kept, most):
    """Of perplexity; the latter is one bit for each dense channel."""
    cache = {"kept": kept, "group": 2, "store": "tiers", "allocator": "measured"}
    found = measured("svd_llm", 1.0, cache=cache)
    assert found.plan.totals.kv_bytes_per_token <= kept * DENSE_KV
    scored = found.measured
    assert scored.perplexity <= (1 + most) * scored.perplexity_dense
