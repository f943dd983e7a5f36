"""`offline-compress merge`, and deltas on their base, from the command line."""

import pytest
import torch
from runs import fine_tuned, recipe_for, tensors_of

from offline_compress.pipeline import compress


@pytest.fixture(scope="module")
def base(noisy_checkpoint):
    return noisy_checkpoint("llama")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return fine_tuned(base, tmp_path_factory.mktemp("tuned") / "tuned")


@pytest.fixture(scope="module")
def delta(base, tuned, short_text, tmp_path_factory):
    """The fine-tuned model as a packed difference from its base."""
    out = tmp_path_factory.mktemp("delta") / "out"
    recipe = recipe_for(short_text, {"name": "impart", "base": str(base)}, kept=0.5, kv=None)
    compress(recipe, str(tuned), out)
    return out


def test_one_dense_model_at_scale_one_is_that_model(invoke, base, tuned, tmp_path):
    code, _, errors = invoke("merge", tmp_path / "out", tuned, "--base", base)
    assert code == 0, errors
    merged, expected = tensors_of(tmp_path / "out"), tensors_of(tuned)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=0)


def test_a_delta_merges_like_what_it_restores(invoke, base, delta, tmp_path):
    assert invoke("merge", tmp_path / "merged", delta, "--base", base)[0] == 0
    assert invoke("restore", delta, tmp_path / "restored", "--base", base)[0] == 0
    merged, restored = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "restored")
    for name, tensor in restored.items():
        torch.testing.assert_close(merged[name], tensor)


def test_two_of_the_same_at_half_scale_are_one(invoke, base, tuned, tmp_path):
    arguments = ["merge", tmp_path / "out", tuned, tuned, "--base", base, "--scale", "0.5"]
    assert invoke(*arguments)[0] == 0
    merged, expected = tensors_of(tmp_path / "out"), tensors_of(tuned)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor)


def test_another_base_is_refused_by_its_weights(invoke, tuned, delta, short_text, tmp_path):
    command = ["evaluate", delta, "--text", short_text, "--context", "64", "--base", tuned]
    for arguments in (command, ["merge", tmp_path / "out", delta, "--base", tuned]):
        code, _, errors = invoke(*arguments)
        assert code == 1
        assert "is not the model that the deltas were taken from" in errors
        assert "Remedy" in errors
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_tensors_and_a_bad_option_are_refused(
    invoke, base, tuned, delta, noisy_checkpoint, tmp_path
):
    other = noisy_checkpoint("qwen2")
    for model, of in ((other, base), (delta, other)):  # dense, and as a delta
        code, _, errors = invoke("merge", tmp_path / "a", model, "--base", of)
        assert code == 1
        assert f"{model} has other tensors than the base" in errors
    wrong = ["merge", tmp_path / "b", tuned, "--base", base, "--ties", "--keep", "0"]
    assert "ties keeps 0.0" in invoke(*wrong)[2]
    assert not list(tmp_path.iterdir())
