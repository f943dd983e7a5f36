"""From a recipe and the shapes of a model to a RankPlan; no weight is read."""

import math
from collections.abc import Iterator, Mapping, Sequence

from offline_compress.allocation import (
    CachePlan,
    CalibrationCost,
    MatrixPlan,
    RankPlan,
    plan_caches,
    plan_matrices,
)
from offline_compress.calibration import gram_bytes, groups, sites
from offline_compress.families import head_dim, layer_paths
from offline_compress.methods import workspace_bytes
from offline_compress.recipe import CompressionRecipe, RecipeError
from offline_compress.weights import Source

# With fewer tokens per channel a Gram fits the noise of its sample as well as the data.
_TOKENS_PER_CHANNEL = 4
# Bases of rotated keys know the angles of the calibrated positions only.
_SHORTEST_CONTEXT = 1 / 4


def plan(recipe: CompressionRecipe, source: Source) -> RankPlan:
    """What the recipe does to the model.

    Raises RecipeError if the recipe asks for layers, ranks or positions that the model does not
    have, or for nothing at all.
    """
    config, family = source.config, source.family
    problems = recipe.kv.problems(config.num_hidden_layers, head_dim(config))
    context, positions = recipe.calibration.context, config.max_position_embeddings
    if context > positions:
        problems.append(f"calibration.context: {context} exceeds the model's {positions} positions")
    if problems:
        raise RecipeError("the recipe", problems)
    linears = source.linears()
    matrices = plan_matrices(
        linears,
        kept=recipe.weights.kept,
        rank_multiple=recipe.weights.rank_multiple,
        method=recipe.weights.method.name,
    )
    compressed = {f"{path}.weight" for path, matrix in matrices.items() if matrix.rank is not None}
    caches = plan_caches(
        [f"{layer}.{family.attention}" for layer in layer_paths(config)],
        config.num_key_value_heads,
        head_dim(config),
        recipe.kv,
    )
    held = site_groups(recipe, source, matrices)
    made = RankPlan(
        dtype=source.dtype,
        matrices=matrices,
        caches=caches,
        source_bytes=sum(map(source.bytes_of, source.shapes)),
        copied_bytes=sum(source.bytes_of(name) for name in source.shapes if name not in compressed),
        calibration=_cost(recipe, source, matrices, held),
        warnings=(*_too_few_tokens(recipe, held), *_too_short_context(recipe, positions, caches)),
    )
    if not made.compressed and not made.projected:
        raise RecipeError(
            "the recipe",
            ["every matrix and every cache would stay dense; lower weights.kept or kv.kept"],
        )
    return made


def site_groups(
    recipe: CompressionRecipe, source: Source, matrices: Mapping[str, MatrixPlan]
) -> list[dict[str, int]]:
    """The sites (path to width n) of each calibration pass, in execution order."""
    observed = sites(source.family, source.config)
    widths = {
        observed[path]: matrix.in_features
        for path, matrix in matrices.items()
        if matrix.rank is not None
    }
    if recipe.weights.method.needs == "gram":
        return groups(widths)
    return [widths] if widths else []


def _cost(
    recipe: CompressionRecipe,
    source: Source,
    matrices: Mapping[str, MatrixPlan],
    held: Sequence[Mapping[str, int]],
) -> CalibrationCost:
    needs = recipe.weights.method.needs
    grams = [gram_bytes(group.values()) for group in held] if needs == "gram" else []
    spaces = [
        workspace_bytes(plan.out_features, plan.in_features)
        for plan in matrices.values()
        if plan.rank is not None
    ]
    return CalibrationCost(
        passes=0 if needs == "nothing" else len(held),
        gram_bytes=max(grams, default=0),
        workspace_bytes=max(spaces, default=0),
        weight_elements=sum(map(math.prod, source.shapes.values())),
    )


def _too_few_tokens(recipe: CompressionRecipe, held: Sequence[Mapping[str, int]]) -> Iterator[str]:
    calibration = recipe.calibration
    if recipe.weights.method.needs != "gram":
        return
    tokens = calibration.samples * calibration.context
    starved: dict[str, int] = {}
    for path, width in (site for group in held for site in group.items()):
        if tokens < _TOKENS_PER_CHANNEL * width:
            starved[".".join("*" if part.isdigit() else part for part in path.split("."))] = width
    if starved:
        needed = _TOKENS_PER_CHANNEL * max(starved.values())
        named = ", ".join(f"{path} ({width})" for path, width in starved.items())
        yield (
            f"{tokens} calibration tokens are fewer than {_TOKENS_PER_CHANNEL} per input channel "
            f"of {named}; --samples {-(-needed // calibration.context)} gives enough"
        )


def _too_short_context(
    recipe: CompressionRecipe, positions: int, caches: Mapping[str, CachePlan]
) -> Iterator[str]:
    context = recipe.calibration.context
    post = any(plan.projection and plan.projection.mode == "post" for plan in caches.values())
    if post and context < _SHORTEST_CONTEXT * positions:
        yield (
            f"bases of rotated keys (kv mode post) see {context} of the model's {positions} "
            "positions; raise calibration.context, or use --kv-mode pre"
        )
