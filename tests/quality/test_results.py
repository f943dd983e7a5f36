"""The published results say what the project says of them."""

import json
from math import log2
from pathlib import Path
from statistics import median

import pytest

from benchmarks.engine.turns import Report
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


AVX2, AVX512 = "amd-epyc-2-cores", "amd-epyc-avx512-2-cores"
AMX = "intel-xeon-amx-2-cores"

TIERS = sorted(RESULTS.glob("*/kv_tiers*/*.json"))
MOST = {0.25: 0.002, 0.125: 0.01, 0.0625: 0.04}  # of perplexity, at shares of the cache's bytes
# Python, which this model cannot read, becomes 2.4 % less likely, by int2 2.0 %.
LESS_LIKELY_THAN_BY_INT2 = ("wiki-qwen3-mha", "cpython-3.11/test.txt", 0.125)


def tiers_of(path):
    """The dense model, and points of `tiers`, of those measured, and of dense caches quantised."""
    found = Quality.model_validate_json(path.read_text())
    uniform, ours = (
        {p.kept: p for p in found.points if p.method == f"kv pre group 2 tiers{allocator}"}
        for allocator in ("", " measured")
    )
    dense = {p.method.split()[1]: p for p in found.points if p.method.startswith("quantised")}
    return found, uniform, ours, dense


@pytest.mark.parametrize("path", TIERS, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_tiers_keep_what_they_promise_and_beat_caches_that_are_only_quantised(path):
    found, _, ours, dense = tiers_of(path)
    whole = round(dense["int8"].kv_bytes_per_token / dense["int8"].kept)
    for kept, most in MOST.items():
        assert ours[kept].kv_bytes_per_token <= kept * whole
        change = ours[kept].texts[IN_DOMAIN].perplexity / found.dense[IN_DOMAIN].perplexity - 1
        assert change <= most
    for text in found.dense:
        for kept, bits in ((0.25, "int4"), (0.125, "int2")):
            assert ours[kept].kv_bytes_per_token < dense[bits].kv_bytes_per_token
            assert ours[kept].texts[text].kl < dense[bits].texts[text].kl / 10
            if dense[bits].texts[text].perplexity > found.dense[text].perplexity:
                # Text that a small model cannot read may become likelier by noise.
                nearer = ours[kept].texts[text].perplexity < dense[bits].texts[text].perplexity
                assert nearer == ((path.stem, text, kept) != LESS_LIKELY_THAN_BY_INT2)
        assert ours[0.125].texts[text].kl < dense["int4"].texts[text].kl


def test_half_of_the_bytes_are_nearer_to_dense_than_int8():
    found, _, ours, dense = tiers_of(RESULTS / AVX2 / "kv_tiers" / "wiki-llama-s.json")
    assert ours[0.5].kv_bytes_per_token < dense["int8"].kv_bytes_per_token
    for text in found.dense:
        assert ours[0.5].texts[text].kl < dense["int8"].texts[text].kl / 1.5


def test_bytes_by_measured_damage_beat_layers_that_are_cut_alike_in_domain():
    _, uniform, ours, _ = tiers_of(RESULTS / AVX2 / "kv_tiers" / "wiki-llama-s.json")
    for kept in MOST:
        assert ours[kept].texts[IN_DOMAIN].kl < uniform[kept].texts[IN_DOMAIN].kl / 1.5


def test_tiers_hold_in_a_longer_context():
    found, _, ours, _ = tiers_of(RESULTS / AVX2 / "kv_tiers_1024" / "wiki-llama-s.json")
    assert found.context == 1024 and ours.keys() >= MOST.keys()


def test_first_positions_held_exactly_gain_less_than_all_do_by_the_same_bytes():
    _, _, ours, _ = tiers_of(RESULTS / AVX2 / "kv_tiers" / "wiki-llama-s.json")
    found, *_ = tiers_of(RESULTS / AVX2 / "kv_sinks" / "wiki-llama-s.json")
    exact = {p.kept: p for p in found.points if p.method.endswith("tiers measured exact 4")}
    for kept in (0.125, 0.0625):
        bytes_more = 1 + 4 / found.context * (1 / kept - 1)
        for text in found.dense:
            now, twice, held = (p.texts[text].kl for p in (ours[kept], ours[2 * kept], exact[kept]))
            assert held > now * bytes_more ** -log2(now / twice)


def test_tiers_were_measured_on_grouped_heads_and_on_heads_with_a_norm_each():
    assert {path.stem for path in TIERS} >= {"wiki-llama-s", "wiki-llama-mha", "wiki-qwen3-mha"}
    for path in TIERS:
        assert len(list(path.parent.glob(f"{path.stem}-kv-*.png"))) == 2


@pytest.mark.parametrize(
    ("machine", "name", "least"),
    [
        (AVX2, "serving_one_request", {"pre": 1.0, "post": 1.0, "tiers": 0.97}),
        (AVX2, "serving_tiers", {"tiers": 1.6, "post": 1.6}),
        (AVX2, "serving_tiers_fp32", {"tiers": 1.4, "post": 1.6}),
        (AVX512, "serving_tiers", {"int8": 1.6, "tiers": 1.6}),
        (AVX512, "serving_tiers_fp32", {"int8": 1.6, "tiers": 1.6}),
        (AMX, "serving_tiers", {"tiers": 1.6}),
    ],
)
def test_tokens_per_second_in_the_same_bytes_of_cache(machine, name, least):
    found = json.loads((RESULTS / machine / f"{name}.json").read_text())
    servers = {server["name"]: server for server in found["servers"]}
    speed = {
        name: median(load["output_throughput"] for load in server["rounds"])
        for name, server in servers.items()
    }
    dense = servers["dense"]
    for other, ratio in least.items():
        assert servers[other]["cache"]["memory_bytes"] == dense["cache"]["memory_bytes"]
        assert servers[other]["quality"]["perplexity"] < 1.02 * dense["quality"]["perplexity"]
        assert speed[other] >= ratio * speed["dense"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("machine", "batch"), [(AVX512, 1), (AMX, 1), (AMX, 16)])
def test_decode_steps_of_few_requests_in_turn_with_dense_ones(machine, batch, dtype):
    report = Report.model_validate_json((RESULTS / machine / "engine.json").read_text())
    rows = {row.engine: row for row in report.rows if (row.dtype, row.batch) == (dtype, batch)}
    for engine in ("pre", "post", "tiers"):
        assert rows[engine].perplexity < 1.02 * rows["dense"].perplexity
        assert median(rows[engine].times_dense) >= 0.97


@pytest.mark.parametrize(
    "name", [f"{AVX2}/kernels", f"{AVX512}/kernels", f"{AVX512}/kernels_slow_memory"]
)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_half_the_channels_are_decoded_half_again_as_fast(name, batch):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    (post,) = (row for row in rows if (row["kernel"], row["batch"]) == ("post 0.5", batch))
    assert post["context"] == 4096 and median(post["times_dense"]) >= 1.5


def test_prompts_of_a_model_of_today_take_no_longer_than_dense():
    rows = json.loads((RESULTS / AVX512 / "prompts.json").read_text())["rows"]
    assert {row["queries"] for row in rows} == {2048}
    assert all(median(row["times_dense"]) >= 0.97 for row in rows)
