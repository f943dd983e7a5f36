"""From a recipe, the shapes of a model and an allocation to a RankPlan; no weight is read."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from offline_compress.allocation import (
    ALLOCATORS,
    Asks,
    CacheEvidence,
    CachePlan,
    Evidence,
    Matrix,
    MatrixPlan,
    RankPlan,
    Shares,
    plan_caches,
)
from offline_compress.cost import expected_cost
from offline_compress.families import head_dim, layer_paths
from offline_compress.methods import Layer, LowRankMethod, Method, OfferingMethod
from offline_compress.recipe import CompressionRecipe, RecipeError
from offline_compress.weights import Source

# What only a method that truncates at ranks can give.
_OF_RANKS: frozenset[Asks] = frozenset({"spectra", "losses", "gates"})
# With fewer tokens per channel a Gram fits the noise of its sample as well as the data.
_TOKENS_PER_CHANNEL = 4
# Bases of rotated keys know the angles of the calibrated positions only.
_SHORTEST_CONTEXT = 1 / 4


def layers_of(source: Source) -> list[Layer]:
    """The decoder layers as methods see them."""
    config = source.config
    linears = source.linears()
    return [
        Layer(
            path=path,
            shapes={name: shape for name, shape in linears.items() if name.startswith(f"{path}.")},
            query_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            item_bytes=source.item_bytes,
            qk_norm=source.family.qk_norm,
            biased=frozenset(name for name in linears if f"{name}.bias" in source.shapes),
        )
        for path in layer_paths(config)
    ]


def matrices_of(layers: Sequence[Layer], method: Method) -> dict[str, Matrix]:
    """The compressible matrices as allocators see them."""
    return {
        path: Matrix(
            *shape,
            layer=index,
            kind=path.rpartition(".")[2],
            rank_share=method.rank_share(*shape, layer.item_bytes)
            if isinstance(method, LowRankMethod)
            else None,
        )
        for index, layer in enumerate(layers)
        for path, shape in layer.shapes.items()
    }


def kept_of(recipe: CompressionRecipe) -> Fraction:
    """The budget in decimals, as the user wrote it: 0.29 of 100 is 29, binary floats give 28."""
    return Fraction(str(recipe.weights.kept))


def plan(
    recipe: CompressionRecipe,
    source: Source,
    shares: Shares | None = None,
    measured: CacheEvidence | None = None,
) -> RankPlan:
    """What the recipe does to the model.

    Without `shares` an allocator that must measure first is planned like uniform, without
    `measured` a K/V budget that must, on a guess; the plan says so. Raises RecipeError if the
    recipe asks for layers, ranks or positions that the model does not have, for ranks of a method
    that has none, or for nothing at all.
    """
    config = source.config
    problems = recipe.kv.problems(
        config.num_hidden_layers, config.num_key_value_heads, head_dim(config)
    )
    context, positions = recipe.calibration.context, config.max_position_embeddings
    if context > positions:
        problems.append(f"calibration.context: {context} exceeds the model's {positions} positions")
    problems += _without_ranks(recipe)
    problems += _with_own_caches(recipe)
    if problems:
        raise RecipeError("the recipe", problems)
    layers = layers_of(source)
    warnings = []
    if shares is None:
        allocator = recipe.weights.allocator
        seen = matrices_of(layers, recipe.weights.method)
        if allocator.asks:
            warnings.append(
                f"the {allocator.name} allocator measures before it decides; the ranks shown are "
                "those of uniform"
            )
            shares = dict.fromkeys(seen, kept_of(recipe))
        else:
            shares = allocator.shares(
                kept_of(recipe), Evidence(seen, rank_multiple=recipe.weights.rank_multiple)
            )
    if recipe.kv.measures and measured is None:
        warnings.append(
            "the K/V budget measures before it decides; the sizes shown are of a geometric spectrum"
        )
    matrices, caches = _planned(recipe, source, layers, shares, measured)
    replaced = {f"{path}.weight" for path, matrix in matrices.items() if matrix.module}
    made = RankPlan(
        dtype=source.dtype,
        matrices=matrices,
        caches=caches,
        source_bytes=sum(map(source.bytes_of, source.shapes)),
        copied_bytes=sum(source.bytes_of(name) for name in source.shapes if name not in replaced),
        calibration=expected_cost(recipe, source, layers, matrices, caches),
        warnings=(
            *warnings,
            *_too_few_tokens(recipe, matrices),
            *_too_short_context(recipe, positions, caches),
        ),
    )
    if made.totals.linear_kept > recipe.weights.kept:
        too_much = (
            f"the least that {recipe.weights.method.name} can make keeps "
            f"{made.totals.linear_kept:.3f} of the bytes, more than weights.kept"
        )
        made = made.model_copy(update={"warnings": (*made.warnings, too_much)})
    too_large = tuple(_too_large_caches(recipe, source, made))
    made = made.model_copy(update={"warnings": (*made.warnings, *too_large)})
    # A delta of everything is the fine-tuned model itself.
    whole = recipe.weights.method.base_model is not None
    if not made.compressed and not made.projected and not whole:
        raise RecipeError(
            "the recipe",
            ["every matrix and every cache would stay dense; lower weights.kept or kv.kept"],
        )
    return made


def _without_ranks(recipe: CompressionRecipe) -> Iterator[str]:
    method, allocator = recipe.weights.method, recipe.weights.allocator
    if not accepts(type(method), allocator.asks):
        others = [name for name, other in ALLOCATORS.items() if accepts(type(method), other().asks)]
        lacking = "predict losses" if "menus" in allocator.asks else "split into ranks"
        yield (
            f"weights.allocator: {allocator.name} was given, and {method.name} does not {lacking}; "
            f"accepted with it are {', '.join(others)}"
        )


def _with_own_caches(recipe: CompressionRecipe) -> Iterator[str]:
    method, cache = recipe.weights.method, recipe.kv
    brings = type(method).projection_at is not Method.projection_at and recipe.weights.kept < 1
    if brings and cache.kept is not None and (cache.store != "model" or cache.measures):
        yield (
            f"kv.store, kv.allocator: {cache.store}, {cache.allocator} were given, and "
            f"{method.name} makes K/V projections of its own; accepted with it are model, uniform"
        )


def accepts(method: type[Method], asks: frozenset[Asks]) -> bool:
    """Whether a method can give what an allocator asks for."""
    if asks & _OF_RANKS:
        return issubclass(method, LowRankMethod)
    return "menus" not in asks or issubclass(method, OfferingMethod)


def _planned(
    recipe: CompressionRecipe,
    source: Source,
    layers: Sequence[Layer],
    shares: Shares,
    measured: CacheEvidence | None,
) -> tuple[dict[str, MatrixPlan], dict[str, CachePlan]]:
    method, dense = recipe.weights.method, recipe.weights.kept == 1
    matrices: dict[str, MatrixPlan] = {}
    attention = source.family.attention
    caches = plan_caches(
        [f"{layer.path}.{attention}" for layer in layers],
        source.config.num_key_value_heads,
        head_dim(source.config),
        recipe.kv,
        source.item_bytes,
        measured,
    )
    for layer in layers:
        of_layer = {path: shares[path] for path in layer.shapes}
        chosen = {} if dense else method.modules_at(layer, of_layer, recipe.weights.rank_multiple)
        for path, (rows, columns) in layer.shapes.items():
            found = chosen.get(path, "weights.kept is 1")
            matrices[path] = (
                _unchanged(source, path, rows, columns, found)
                if isinstance(found, str)
                else MatrixPlan(
                    out_features=rows, in_features=columns, module=found, method=method.name
                )
            )
        own = None if dense else method.projection_at(layer, of_layer)
        if own is not None:
            cache = caches[f"{layer.path}.{attention}"]
            caches[f"{layer.path}.{attention}"] = cache.model_copy(
                update={"projection": own, "reason": None}
            )
    return matrices, caches


def _unchanged(source: Source, path: str, rows: int, columns: int, reason: str) -> MatrixPlan:
    """A matrix that stays as the source has it."""
    if source.quantised is None or path not in source.quantised.shapes:
        return MatrixPlan(out_features=rows, in_features=columns, reason=reason)
    return MatrixPlan(
        out_features=rows,
        in_features=columns,
        stored_bytes=source.bytes_of(f"{path}.weight"),
        reason=f"quantised by {source.quantised.method}",
    )


def _too_few_tokens(recipe: CompressionRecipe, matrices: Mapping[str, MatrixPlan]) -> Iterator[str]:
    calibration = recipe.calibration
    if not recipe.weights.method.needs & {"gram", "shifted_gram"}:
        return
    tokens = calibration.samples * calibration.context
    starved: dict[str, int] = {}
    for path, matrix in matrices.items():
        if matrix.module and tokens < _TOKENS_PER_CHANNEL * matrix.in_features:
            name = ".".join("*" if part.isdigit() else part for part in path.split("."))
            starved[name] = matrix.in_features
    if starved:
        needed = _TOKENS_PER_CHANNEL * max(starved.values())
        named = ", ".join(f"{path} ({width})" for path, width in starved.items())
        yield (
            f"{tokens} calibration tokens are fewer than {_TOKENS_PER_CHANNEL} per input channel "
            f"of {named}; --samples {math.ceil(needed / calibration.context)} gives enough"
        )


def _too_large_caches(recipe: CompressionRecipe, source: Source, made: RankPlan) -> Iterator[str]:
    budget, size = recipe.kv, head_dim(source.config)
    if any(layer.k_rank or layer.v_rank for layer in budget.layers.values()):
        return  # as asked for
    asked = sum(budget.sizes(size, source.item_bytes))
    asked /= 2 * budget.group * size * source.item_bytes
    kept = made.totals.kv_bytes_per_token / made.totals.kv_bytes_per_token_dense
    if kept > asked:
        nearest = budget.store == "model" and budget.allocator == "uniform"
        what = "ranks of the nearest size keep" if nearest else "the least that latents take keeps"
        yield f"{what} {kept:.3f} of the cache's bytes, more than the {asked:g} asked for"


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
