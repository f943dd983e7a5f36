"""The quality benchmark on a tiny model: what its points are, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.offline.quality import Laboratory, measure, variants
from offline_compress.recipe import RecipeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def laboratory(tiny_checkpoint, short_text):
    return Laboratory.of(tiny_checkpoint("llama"), short_text, short_text, samples=8, context=64)


def test_every_point_is_a_model_of_its_own_and_the_dense_one_stays(laboratory):
    dense = laboratory.score(laboratory.model)
    axes = {"methods": ["svd_llm", "svd"], "kept": [0.6], "modes": ["pre"], "kv_kept": [0.5, 0.25]}
    points = list(measure(laboratory, **axes, dense=dense))
    assert [(point.what, point.kept) for point in points] == [
        ("svd_llm", 0.6),
        ("svd", 0.6),
        ("kv pre", 0.5),
        ("kv pre", 0.25),
    ]
    assert laboratory.score(laboratory.model) == dense
    assert len({point.perplexity for point in points} | {dense}) == 5
    for point in points:
        assert point.change_percent == pytest.approx(100 * (point.perplexity / dense - 1))
    weights, caches = points[:2], points[2:]
    assert len({point.checkpoint_bytes for point in weights}) == 1
    full = 2 * 2 * 2 * 32 * 4  # layers, K and V, heads, channels, bytes of fp32
    assert {point.kv_bytes_per_token for point in weights} == {full}
    assert [point.kv_bytes_per_token for point in caches] == [full // 2, full // 4]


def test_shared_statistics_are_those_of_each_method_alone(laboratory):
    (variant,) = variants(methods=["asvd"], kept=[0.6], modes=[], kv_kept=[])
    recipe = laboratory.calibrated(variant.recipe)
    needed, more = (
        laboratory.with_weights(recipe, laboratory.statistics(needs)).state_dict()
        for needs in ("mean_abs", "gram")
    )
    assert needed.keys() == more.keys()
    assert all(torch.equal(needed[name], more[name]) for name in needed)


def test_every_bad_value_is_named_by_its_flag_before_anything_is_loaded():
    axes = {"methods": ["svd", "magic"], "kept": [1.5, 0.5], "modes": ["mid"], "kv_kept": [0.0]}
    with pytest.raises(RecipeError) as caught:
        variants(**axes)
    assert len(caught.value.problems) == len(set(caught.value.problems)) == 4
    for said in ("(--method): ", "(--kept): 1.5 ", "(--kv-mode): 'mid'", "(--kv-kept): 0.0 "):
        assert said in str(caught.value)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.offline", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_writes_json_and_refuses_in_one_message(
    tiny_checkpoint, short_text, tmp_path
):
    common = [tiny_checkpoint("llama"), "--calibration", short_text, "--text", short_text]
    small = ["--samples", "8", "--context", "64", "--method", "asvd", "--kept", "0.5"]
    small += ["--kv-mode", "post", "--kv-kept", "0.5"]
    done = run(*common, *small, "--out", tmp_path / "new" / "quality.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new" / "quality.json").read_text())
    assert [point["what"] for point in found["points"]] == ["asvd", "kv post"]
    assert found["calibration_tokens"] == 8 * 64
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["quality.json"]

    refused = run(*common, "--method", "magic", "--kept", "2")
    assert refused.returncode == 1
    assert refused.stderr.count("error: ") == 1
    assert "Traceback" not in refused.stderr
    assert "Loading weights" not in refused.stderr
