"""Recipes from YAML and flags: what they mean, and every problem named at once."""

import re

import pytest
import yaml
from pydantic import ValidationError

from offline_compress.allocation import ALLOCATORS, Strs, Uniform, WaterFilling
from offline_compress.methods import METHODS, Asvd, SvdLlm
from offline_compress.recipe import FLAGS, CompressionRecipe, RecipeError, load, load_valid


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_the_defaults_are_those_the_command_line_documents():
    recipe = load()
    assert (recipe.weights.method, recipe.weights.allocator) == (SvdLlm(), Uniform())
    assert (recipe.weights.kept, recipe.kv.kept, recipe.kv.mode) == (0.8, 0.5, "pre")
    assert (recipe.calibration.samples, recipe.calibration.seed) == (64, 0)


def test_a_recipe_survives_its_yaml(write):
    recipe = load(
        write(
            """
            weights:
                method: {name: asvd, alpha: 0.3}
                allocator: {name: strs, grid: [0.25, 0.5]}
                kept: 0.6
                rank_multiple: 8
            kv: {mode: post, kept: null, v_kept: 0.25, layers: {3: {mode: pre, k_rank: 16}}}
            calibration: {text: corpus.txt, samples: 8, device: cpu}
            """
        )
    )
    assert recipe.kv.layers[3].k_rank == 16
    assert recipe.weights.allocator == Strs(grid=(0.25, 0.5))
    assert CompressionRecipe.model_validate(yaml.safe_load(recipe.yaml())) == recipe
    assert load(write(recipe.yaml())) == recipe


def test_a_method_and_an_allocator_are_names_or_mappings(write):
    for name in ("asvd", "{name: asvd}"):
        assert load(write(f"weights: {{method: {name}}}")).weights.method == Asvd()
    for name in ("water_filling", "{name: water_filling}"):
        found = load(write(f"weights: {{allocator: {name}}}")).weights.allocator
        assert found == WaterFilling()


def test_empty_files_and_sections_mean_defaults(write):
    assert load(write("")) == load(write("weights:\nkv:\n")) == CompressionRecipe()


def test_flags_override_the_file_and_leave_the_rest(write):
    path = write("weights: {kept: 0.6, rank_multiple: 4}\nkv: {kept: 0.25}")
    recipe = load(path, {"--kept": 0.7, "--kv-mode": "post", "--seed": None})
    assert (recipe.weights.kept, recipe.weights.rank_multiple) == (0.7, 4)
    assert (recipe.kv.kept, recipe.kv.mode) == (0.25, "post")


def test_the_method_flag_keeps_the_options_of_the_same_method_only(write):
    path = write("weights: {method: {name: asvd, alpha: 0.3}}")
    assert load(path, {"--method": "asvd"}).weights.method == Asvd(alpha=0.3)
    assert load(path, {"--method": "svd_llm"}).weights.method == SvdLlm()


def test_the_allocator_flag_keeps_the_options_of_the_same_allocator_only(write):
    path = write("weights: {allocator: {name: strs, max_evaluations: 9}}")
    assert load(path, {"--allocator": "strs"}).weights.allocator == Strs(max_evaluations=9)
    assert load(path, {"--allocator": "uniform"}).weights.allocator == Uniform()


def test_every_flag_sets_a_field_of_the_recipe():
    for field in FLAGS.values():
        section, name = field.split(".")
        assert name in type(getattr(CompressionRecipe(), section)).model_fields


def test_every_problem_is_named_with_its_path_flag_and_what_is_accepted(write):
    path = write(
        """
        weights:
            method: {name: asvd, alpha: 2, beta: 1}
            allocator: {name: strs, grid: [0.5, 2], cut: 1}
            rank: 3
        kv: {mode: mid, layers: {0: {rank: 3}}}
        calibration: {samples: 0}
        extra: {}
        """
    )
    with pytest.raises(RecipeError) as caught:
        load(path, {"--kept": 1.5})
    assert str(caught.value).startswith(f"{path} is not a valid recipe")
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == [
        "calibration.samples",
        "extra",
        "kv.layers.0.rank",
        "kv.mode",
        "weights.allocator.cut",
        "weights.allocator.grid.1",
        "weights.kept (--kept)",
        "weights.method.alpha",
        "weights.method.beta",
        "weights.rank",
    ]
    text = str(caught.value)
    assert "1.5 was given; input should be less than or equal to 1" in text
    assert "'mid' was given; input should be 'pre' or 'post'" in text
    assert "kv.layers.0.rank: unknown; accepted here are mode, k_rank, v_rank" in text
    assert "weights.method.beta: unknown; accepted here are name, alpha" in text
    assert re.search(r"weights\.allocator\.cut: unknown; accepted here are .*max_evaluations", text)
    assert "extra: unknown; accepted here are weights, kv, calibration, evaluation" in text


def test_the_valid_part_of_a_recipe_survives_the_rest(write):
    path = write("weights: {kept: 3, rank_multiple: 4}\nkv: 5\ncalibration: {samples: 9}\nx: 1")
    recipe, error = load_valid(path, {"--text": "a.txt", "--kv-mode": "post"})
    assert len(error.problems) == 3
    assert (recipe.weights.kept, recipe.weights.rank_multiple) == (0.8, 4)
    assert (recipe.calibration.samples, recipe.calibration.text) == (9, "a.txt")
    assert load_valid(None, {"--kept": 0.7})[1] is None


def test_a_recipe_to_publish_holds_no_directory():
    recipe = CompressionRecipe.model_validate({"calibration": {"text": "/home/me/corpus.txt"}})
    assert recipe.without_directories().calibration.text == "corpus.txt"
    assert CompressionRecipe().without_directories() == CompressionRecipe()


@pytest.mark.parametrize(("field", "known"), [("method", METHODS), ("allocator", ALLOCATORS)])
def test_an_unknown_name_lists_the_known_ones(write, field, known):
    accepted = re.escape(f"'magic' was given; accepted are {', '.join(known)}")
    with pytest.raises(RecipeError, match=rf"weights\.{field} \(--{field}\): {accepted}"):
        load(None, {f"--{field}": "magic"})
    with pytest.raises(RecipeError, match=rf"weights\.{field}: {accepted}"):
        load(write(f"weights: {{{field}: {{name: magic}}}}"))
    with pytest.raises(RecipeError, match=rf"weights\.{field}"):
        load(write(f"weights: {{{field}: {{alpha: 0.5}}}}"))


@pytest.mark.parametrize("kept", [0, -0.1, 1.01, float("nan"), float("inf"), "half"])
def test_a_share_outside_its_range_is_refused(kept):
    for flag in ("--kept", "--kv-kept"):
        with pytest.raises(RecipeError, match=f"{flag}"):
            load(None, {flag: kept})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: [", "not YAML"),
        ("- weights", "holds a list"),
        ("weights: 3", "weights"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("kv: {layers: {first: {k_rank: 8}}}", "kv.layers.first"),
    ],
)
def test_a_malformed_file_is_one_error(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load(write(text))


def test_a_missing_file_and_a_binary_file_are_errors(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not YAML"):
        load(tmp_path / "binary")


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        CompressionRecipe().weights.kept = 0.5
