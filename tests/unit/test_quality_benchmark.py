"""The quality laboratory on a tiny model: what its points are, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import fine_tuned

from benchmarks.offline import variants
from benchmarks.offline.compare import Scored
from benchmarks.offline.results import Quality
from offline_compress import reference
from offline_compress.evaluation import perplexity
from offline_compress.preflight import load_tokenizer
from offline_compress.recipe import RecipeError, parse
from offline_compress.weights import open_source

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.offline", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def laboratory(tiny_checkpoint, short_text, tmp_path_factory):
    """The directory of a laboratory run, and the command that made it."""
    out = tmp_path_factory.mktemp("laboratory")
    arguments = [
        *("quality", tiny_checkpoint("llama"), "--calibration", short_text, "--text", short_text),
        *("--samples", "8", "--context", "64", "--method", "asvd", "--kept", "0.5"),
        *("--kv-mode", "pre", "--kv-kept", "0.25", "--kv-exact", "0", "--kv-exact", "64"),
        *("--windows", "5", "--out", out),
    ]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return out, arguments


def test_points_tables_and_plots_are_written(laboratory):
    out, _ = laboratory
    (path,) = out.glob("*.json")
    found = Quality.model_validate_json(path.read_text())
    assert [(point.method, point.kept) for point in found.points] == [
        ("asvd", 0.5),
        ("kv pre", 0.25),
        ("kv pre exact 64", 0.25),
    ]
    weights, cache, exact = found.points
    assert weights.checkpoint_bytes < found.checkpoint_bytes
    assert weights.kv_bytes_per_token == 4 * cache.kv_bytes_per_token
    assert exact.perplexity_reloaded == cache.perplexity_reloaded
    assert all(text.kl == 0 for text in exact.texts.values())  # the whole window
    for point in (weights, cache):
        assert point.perplexity_reloaded == pytest.approx(point.perplexity_run, rel=5e-3)
        assert point.seconds > 0
        assert point.peak_bytes > 1 << 20
        for text in point.texts.values():
            assert text.kl > 0
    (dense,) = found.dense.values()
    assert (dense.kl, dense.top1) == (0, 1)
    assert "| asvd | 0.5 |" in path.with_suffix(".md").read_text()
    assert list(out.glob("*.png"))


def test_a_second_run_measures_nothing_again(laboratory):
    out, arguments = laboratory
    (point,) = out.glob("points/*/asvd*.json")
    changed = json.loads(point.read_text()) | {"seconds": 12345.0}
    point.write_text(json.dumps(changed))
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    assert Quality.model_validate_json(path.read_text()).points[0].seconds == 12345.0


def test_deltas_are_measured_against_their_base(noisy_checkpoint, short_text, tmp_path):
    base, other = noisy_checkpoint("llama"), tmp_path / short_text.name
    tuned = fine_tuned(base, tmp_path / "tuned")
    other.write_text(short_text.read_text()[::-1])
    done = run(
        *("quality", tuned, "--calibration", short_text, "--text", short_text, "--text", other),
        *("--samples", "4", "--context", "64", "--method", "impart 8 bit", "--base", base),
        *("--kept", "0.5", "--windows", "2", "--out", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    found = Quality.model_validate_json((tmp_path / "out" / "tuned.json").read_text())
    assert list(found.dense) == [f"{path.parent.name}/{path.name}" for path in (short_text, other)]
    (point,) = found.points
    assert point.perplexity_reloaded == pytest.approx(point.perplexity_run, rel=5e-3)
    assert point.checkpoint_bytes < found.checkpoint_bytes
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_agreement_is_the_perplexity_of_evaluate_and_a_real_divergence(tiny_checkpoint, short_text):
    directory = tiny_checkpoint("llama")
    model = reference.load(directory, "cpu", torch.float32)
    other = reference.load(directory, "cpu", torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    tokenizer = load_tokenizer(open_source(str(directory)).directory)
    scored = Scored(short_text, "a text", tokenizer, 32, 6)
    found = scored.compare(model, other, 4, lambda *_: None)
    body = scored.windows[:, 1:] if tokenizer("")["input_ids"] else scored.windows
    bos = int(scored.windows[0, 0]) if body.shape != scored.windows.shape else None
    expected = perplexity(other, body.flatten(), 32, 4, bos).perplexity
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        p, q = (m(scored.windows).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert found.kl == pytest.approx(float(divergence), rel=1e-3)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_every_variant_is_a_recipe():
    without, every = variants.known(), variants.known(Path("base"))
    assert every.keys() - without.keys() == {"impart", "impart 8 bit", "impart 4 bit"}
    for name, weights in every.items():
        assert parse({"weights": {**weights, "kept": 0.5}}, name).weights.kept == 0.5


def test_every_unknown_name_is_refused_with_the_known_ones(tiny_checkpoint, short_text):
    with pytest.raises(RecipeError) as caught:
        variants.chosen(["svd", "magic", "sorcery"])
    assert len(caught.value.problems) == 2
    assert "gptvq 4d" in str(caught.value)
    common = [tiny_checkpoint("llama"), "--calibration", short_text, "--text", short_text]
    rotated = ("--kv-mode", "post", "--kv-exact", "4")
    for wrong in (("--method", "magic"), ("--method", "svd", "--kept", "2"), rotated):
        refused = run("quality", *common, *wrong)
        assert refused.returncode == 1
        assert refused.stderr.count("error: ") == 1
        assert "Traceback" not in refused.stderr
        assert "Loading weights" not in refused.stderr


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_a_reference_model_is_trained_and_compresses(shape, short_text, tmp_path):
    small = ["--hidden", "32", "--layers", "2", "--heads", "2", "--kv-heads", "1"]
    small += ["--vocabulary", "300", "--context", "32", "--minutes", "0.05", "--shape", shape]
    done = run("reference-model", tmp_path / "model", "--text", short_text, *small)
    assert done.returncode == 0, done.stderr
    training = json.loads((tmp_path / "model" / "training.json").read_text())
    assert training["steps"] > 1
    assert training["loss"] < 6.5  # nats; log 300 is 5.7, and it begins at about that
    assert open_source(str(tmp_path / "model")).family.name == shape
    again = run("reference-model", tmp_path / "model", "--text", short_text, *small)
    assert again.returncode == 1
    assert "already exists" in again.stderr


def test_a_shape_that_is_no_model_is_refused(short_text, tmp_path):
    wrong = ["--heads", "3", "--kv-heads", "2"]
    refused = run("reference-model", tmp_path / "model", "--text", short_text, *wrong)
    assert refused.returncode == 1
    assert refused.stderr.count("error: ") == 1
    assert not (tmp_path / "model").exists()
