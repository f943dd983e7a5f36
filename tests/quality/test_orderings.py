"""On the example model the methods rank as theory says, and K/V projections cost what they should.

WikiText-2 test slice, windows of 512; calibrated on 64 windows of the train slice.
"""

from pathlib import Path

import pytest

from benchmarks.offline.quality import Laboratory, Point, measure

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def points() -> dict[tuple[str, float], Point]:
    laboratory = Laboratory.of(
        EXAMPLES / "wiki-llama-s",
        EXAMPLES / "wikitext-2" / "train.txt",
        EXAMPLES / "wikitext-2" / "test.txt",
        samples=64,
        context=512,
    )
    measured = measure(
        laboratory,
        methods=["svd", "asvd", "svd_llm"],
        kept=[0.6, 0.4],
        modes=["pre", "post"],
        kv_kept=[0.5],
        dense=laboratory.score(laboratory.model),
    )
    return {(point.what, point.kept): point for point in measured}


@pytest.mark.parametrize("kept", [0.6, 0.4])
@pytest.mark.parametrize("baseline", ["svd", "asvd"])
def test_whitening_beats_the_baselines(points, kept, baseline):
    assert points["svd_llm", kept].perplexity < points[baseline, kept].perplexity


def test_half_of_the_kv_channels_before_rope(points):
    """At most 0.2 % of perplexity, and less than the same channels after RoPE cost."""
    pre, post = points["kv pre", 0.5], points["kv post", 0.5]
    assert pre.change_percent <= 0.2
    assert pre.perplexity < post.perplexity
    assert pre.kv_bytes_per_token * 2 == 6 * 2 * 2 * 64 * 2  # half of the dense bytes per token
