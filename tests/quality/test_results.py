"""The published results say what the project says of them."""

from pathlib import Path

import pytest

from benchmarks.offline.results import Quality

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*/quality/wiki-llama-*.json"))
BASELINES = {"svd", "asvd", "fwsvd"}
PUBLISHED = BASELINES | {"svd_llm", "svd_llm_v2", "gfwsvd", "dobi_svd", "modegpt", "gptvq"}
IN_DOMAIN = "wikitext-2/test.txt"
KEPT = (0.8, 0.6, 0.4, 0.2)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def found(request):
    return Quality.model_validate_json(request.param.read_text())


def points(found, kept):
    return {point.method: point for point in found.points if point.kept == kept}


def test_both_models_have_every_method_at_every_ratio():
    assert {path.stem for path in FILES} >= {"wiki-llama-s", "wiki-llama-xs"}
    for path in FILES:
        found = Quality.model_validate_json(path.read_text())
        assert len(found.dense) == 2
        for kept in KEPT:
            assert points(found, kept).keys() >= PUBLISHED | {"auto"}
        plot = path.with_name(f"{path.stem}-wikitext-2-test.png")
        assert path.with_suffix(".md").is_file() and plot.is_file()


@pytest.mark.parametrize("kept", KEPT)
def test_auto_is_closest_to_the_dense_model_in_domain_and_out(found, kept):
    every = points(found, kept)
    auto = every.pop("auto")
    for name, other in every.items():
        for text in found.dense:
            assert auto.texts[text].kl < other.texts[text].kl, (name, text)
            assert auto.texts[text].top1 >= other.texts[text].top1, (name, text)


@pytest.mark.parametrize("kept", KEPT)
def test_whitening_beats_the_baselines_and_ranks_by_loss_uniform_ones(found, kept):
    every = points(found, kept)
    svd_llm = every["svd_llm"].texts[IN_DOMAIN]
    for name in BASELINES:
        assert svd_llm.kl < every[name].texts[IN_DOMAIN].kl
        assert svd_llm.perplexity < every[name].texts[IN_DOMAIN].perplexity
    for name in ("svd_llm_v2", "svd_llm water_filling"):
        assert every[name].texts[IN_DOMAIN].kl < svd_llm.kl


def test_every_checkpoint_gave_what_its_run_measured(found):
    for point in found.points:
        assert point.perplexity_reloaded == pytest.approx(point.perplexity_run, rel=5e-3)
