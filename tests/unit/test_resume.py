"""Runs that were killed go on where they were; runs that fail leave nothing."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from runs import recipe_for, with_weights

from offline_compress import pipeline
from offline_compress.calibration import WeightError
from offline_compress.pipeline import compress
from offline_compress.staging import OutputError
from offline_compress.sweep import Sweep
from offline_compress.workspace import work_root
from vllm_svd.errors import SvdError

UPDATED = {"name": "svd_llm", "update": True}
RECIPES = {
    "update": {"method": UPDATED},
    "gfwsvd": {"method": "gfwsvd"},
    "water_filling": {"method": "svd_llm", "allocator": "water_filling"},
    "auto": {"method": "auto", "kept": 0.3},
    "recover": {"method": {"name": "svd_llm", "recover": {"steps": 2}}},
    "caches": {"kv": {"kept": 0.1, "store": "tiers", "allocator": "measured"}},
}
# Recipe, (stage, done) at which it dies, and what is then left to do.
KILLED = [
    ("update", ("compress", 1), {"blocks": [1]}),
    ("update", ("write", 0), {"blocks": []}),
    ("gfwsvd", ("gradients", 1), {"gradients": 1, "blocks": [0, 1]}),
    ("gfwsvd", ("compress", 1), {"blocks": [1]}),
    ("water_filling", ("sensitivity", 3), {"measured": 1, "blocks": [0, 1]}),
    ("water_filling", ("compress", 1), {"blocks": [1]}),
    ("auto", ("measure", 1), {"measured": 1, "blocks": [0, 1]}),
    ("auto", ("compress", 1), {"blocks": [1]}),
    ("caches", ("probe caches", 2), {"measured": 1, "blocks": [0, 1]}),
    ("caches", ("compress", 1), {"blocks": [1]}),
    ("recover", ("recover", 3), {"blocks": [0, 1]}),  # with the factors that were fine-tuned
]
# Each run is a fork, so that the imports are paid for once.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from offline_compress.pipeline import compress
from offline_compress.recipe import load

threads, model, *runs = sys.argv[1:]
torch.set_num_threads(int(threads))
for run in runs:
    recipe, out, *death = json.loads(run)

    def die(stage, done, _total):
        if [stage, done] == death:
            os.kill(os.getpid(), signal.SIGKILL)

    if not os.fork():
        compress(load(Path(recipe)), model, Path(out), die)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model(noisy_checkpoint):
    return noisy_checkpoint("llama")


@pytest.fixture(scope="module")
def recipes(short_text):
    return {name: recipe_for(short_text, **options) for name, options in RECIPES.items()}


@pytest.fixture(scope="module")
def outs(model, recipes, tmp_path_factory):
    """Where every run of KILLED died."""
    directory, runs, outs = tmp_path_factory.mktemp("killed"), [], []
    for index, (name, death, _) in enumerate(KILLED):
        path = directory / f"{name}.yaml"
        path.write_text(recipes[name].yaml())
        outs.append(directory / str(index) / "out")
        runs.append(json.dumps([str(path), str(outs[-1]), *death]))
    command = [sys.executable, "-c", SCRIPT, str(torch.get_num_threads()), str(model), *runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(KILLED), done.stderr
    return outs


@pytest.fixture(scope="module")
def whole(model, recipes, tmp_path_factory):
    """What runs that nobody killed write."""
    found = {}

    def of(name):
        if name not in found:
            out = tmp_path_factory.mktemp("whole") / "out"
            compress(recipes[name], str(model), out)
            found[name] = bytes_of(out)
        return found[name]

    return of


@pytest.fixture
def work(monkeypatch):
    """What is computed from now on."""
    done = {"gradients": 0, "measured": 0, "blocks": []}
    compress_block, gradient_moments = Sweep._compress, pipeline.gradient_moments
    gathers = {module: module.gather for module in (pipeline.evidence, pipeline.cache_evidence)}

    def block(sweep, index, *blocks):
        done["blocks"].append(index)
        return compress_block(sweep, index, *blocks)

    def gradients(*arguments, **options):
        done["gradients"] += 1
        return gradient_moments(*arguments, **options)

    def watched(gather):
        def measured(*arguments):
            done["measured"] += 1
            return gather(*arguments)

        return measured

    monkeypatch.setattr(Sweep, "_compress", block)
    monkeypatch.setattr(pipeline, "gradient_moments", gradients)
    for module, gather in gathers.items():
        monkeypatch.setattr(module, "gather", watched(gather))
    return done


@pytest.mark.parametrize("case", range(len(KILLED)))
def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(
    case, outs, model, recipes, whole, work
):
    name, _, left = KILLED[case]
    out, expected = outs[case], whole(name)
    work.update(gradients=0, measured=0, blocks=[])
    assert not out.exists()
    compress(recipes[name], str(model), out)
    assert work == {"gradients": 0, "measured": 0} | left
    assert bytes_of(out) == expected
    assert not work_root(out).exists()


class Killed(BaseException):
    """What nobody catches."""


def at(stage, done, error):
    """Progress that ends in an error there."""

    def progress(*now):
        if now[:2] == (stage, done):
            raise error

    return progress


def test_what_another_recipe_left_is_neither_used_nor_removed(model, recipes, tmp_path, work):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compress(recipes["update"], str(model), out, at("compress", 1, Killed()))
    (left,) = work_root(out).iterdir()
    records = sorted(path.name for path in left.iterdir())
    assert "block-0.safetensors" in records
    work["blocks"].clear()
    other = recipes["update"].model_copy(
        update={"kv": recipes["update"].kv.model_copy(update={"kept": 0.25})}
    )
    compress(other, str(model), out)
    assert work["blocks"] == [0, 1]
    assert list(work_root(out).iterdir()) == [left]
    assert sorted(path.name for path in left.iterdir()) == records


def test_what_was_computed_from_other_weights_is_not_used(model, recipes, tmp_path, work):
    copy, out = shutil.copytree(model, tmp_path / "model"), tmp_path / "out"
    with pytest.raises(Killed):
        compress(recipes["update"], str(copy), out, at("compress", 1, Killed()))

    def scale(held):
        held["model.layers.0.mlp.up_proj.weight"] *= 2

    shutil.rmtree(copy)
    with_weights(model, copy, scale)
    work["blocks"].clear()
    compress(recipes["update"], str(copy), out)
    assert work["blocks"] == [0, 1]


def test_the_second_of_two_runs_of_one_recipe_is_refused(model, recipes, whole, tmp_path):
    out, refusals = tmp_path / "out", []

    def again(stage, done, _total):
        if (stage, done) == ("compress", 1):
            with pytest.raises(OutputError, match="another run is writing") as refused:
                compress(recipes["update"], str(model), out)
            refusals.append(refused.value)

    compress(recipes["update"], str(model), out, again)
    assert len(refusals) == 1
    assert bytes_of(out) == whole("update")  # the first one goes on undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_fails_leaves_nothing(model, recipes, tmp_path):
    with pytest.raises(SvdError, match="not today"):
        late = at("write", 0, SvdError("not today"))
        compress(recipes["update"], str(model), tmp_path / "out", late)
    assert not list(tmp_path.iterdir())

    def damage(held):
        held["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("inf")

    damaged = with_weights(model, tmp_path / "model", damage)
    with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight holds"):
        compress(recipes["update"], str(damaged), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [damaged]
