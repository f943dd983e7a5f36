"""From a recipe and the shapes of a model to a RankPlan; no weight is read."""

from offline_compress.allocation import RankPlan, plan_caches, plan_matrices
from offline_compress.calibration import sites
from offline_compress.families import head_dim, layer_paths
from offline_compress.recipe import CompressionRecipe, RecipeError
from offline_compress.weights import Source


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
    observed = sites(family, config)
    gram_sites = dict.fromkeys(
        observed[path] for path, matrix in matrices.items() if matrix.rank is not None
    )
    weights = {f"{path}.weight" for path in linears}
    made = RankPlan(
        dtype=source.dtype,
        matrices=matrices,
        caches=plan_caches(
            [f"{layer}.{family.attention}" for layer in layer_paths(config)],
            config.num_key_value_heads,
            head_dim(config),
            recipe.kv,
        ),
        other_bytes=sum(source.bytes_of(name) for name in source.shapes if name not in weights),
        gram_widths=tuple(linears[path][1] for path in gram_sites),
    )
    if not made.compressed and not made.projected:
        raise RecipeError(
            "the recipe",
            ["every matrix and every cache would stay dense; lower weights.kept or kv.kept"],
        )
    return made
