"""What compressing a model takes, counted from shapes: device and host memory, disk, operations."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

from offline_compress.allocation import (
    LOSS_WINDOWS,
    PROBE_WINDOWS,
    CachePlan,
    CalibrationCost,
    MatrixPlan,
)
from offline_compress.calibration import GRADIENTS, SHIFTED, Needs, stages
from offline_compress.methods import Layer, workspace_bytes
from offline_compress.recipe import CompressionRecipe
from offline_compress.weights import Source

_SQUARE: Needs = frozenset({"gram", "shifted_gram", "shift"})
# fp64 operations of an eigendecomposition with vectors, per cubed size (Golub and Van Loan,
# Matrix Computations, 8.3): tridiagonal reduction, implicit QR and back-transformation.
_EIGH = 9
# Of the speed of a matrix product, what an eigendecomposition reaches: half of its reduction to
# tridiagonal form are matrix-vector products.
_FACTOR_SHARE = 1 / 4
# Passes that a step of fine-tuning takes: forward, once more layer by layer, and back to the inputs
# and to one side of the factors.
_STEP = 4


def expected_cost(
    recipe: CompressionRecipe,
    source: Source,
    layers: Sequence[Layer],
    matrices: Mapping[str, MatrixPlan],
    caches: Mapping[str, CachePlan],
) -> CalibrationCost:
    """Peak bytes and operations of `run`; a block is what one decoder layer holds.

    Memory is of fp32 weights and hidden states, as on a CPU; a GPU holds them in the model's dtype.
    """
    method, allocator = recipe.weights.method, recipe.weights.allocator
    needs = method.needs
    made = {path: matrix for path, matrix in matrices.items() if matrix.module}
    observed = source.family.input_sites(source.config)
    widths = {observed[path]: matrix.in_features for path, matrix in made.items()}
    squares = len(needs & _SQUARE)
    grams, stage_counts, gradients = [0], [0], []
    for layer in layers:
        inside = {site: width for site, width in widths.items() if site in layer.shapes}
        groups = stages(inside) if needs & SHIFTED else [list(inside)]
        held = [sum(8 * inside[site] ** 2 for site in group) for group in groups]
        stage_counts.append(len(groups))
        gradients.append(
            sum(
                8 * ("output_gram" in needs) * rows**2 + 8 * ("fisher" in needs) * columns
                for rows, columns in layer.shapes.values()
            )
        )
        grams.append(max(held, default=0) * squares + gradients[-1])
    calibration, held_out = (
        samples * recipe.calibration.context
        for samples in (recipe.calibration.samples, recipe.evaluation.samples)
    )
    streams = 2 * (calibration + held_out)
    if needs & GRADIENTS:  # before the streams: the calibration set at every border of blocks
        streams = max(streams, (len(layers) + 1) * calibration)
    # A stage runs the dense and the compressed block.
    passes = 2 * max(stage_counts) if needs & SHIFTED else int(bool(needs - GRADIENTS))
    if method.reads_attention:
        passes += max(stage_counts)
    asks = allocator.asks if made else frozenset()
    seen = method.needs_before if asks - {"influence"} else frozenset()
    passes += bool(asks) + bool(seen)  # of the dense model, before anything is compressed
    passes += 2 * recipe.kv.measures
    whole = allocator.windows_read(len(made)) * recipe.calibration.context
    probed = spectra = 0
    if recipe.kv.measures:  # energies of every channel of keys and values
        spectra = 2 * 8 * len(layers) * layers[0].kv_heads * layers[0].head_dim
    if recipe.kv.measures and recipe.kv.allocator == "measured":
        probed = min(PROBE_WINDOWS, recipe.calibration.samples) * recipe.calibration.context
        spectra += 2 * 8 * len(layers)  # and an exchange rate
    trained = _Trained() if method.recovery is None else _trained(made.values())
    if trained.left and method.recovery:
        drawn = 2 * method.recovery.steps * recipe.calibration.batch
        whole += _STEP * drawn * recipe.calibration.context
    stored = sum(plan.bytes(source.item_bytes) for plan in made.values())
    bases = sum(plan.basis_parameters for plan in caches.values()) * source.item_bytes
    weights = [sum(map(math.prod, layer.shapes.values())) for layer in layers]
    factorised = sum(_operations(plan, widths[observed[path]]) for path, plan in made.items())
    if seen:  # spectra and menus, and every matrix at each share that it is tried at
        tried = -(-allocator.windows_read(len(made)) // (LOSS_WINDOWS * len(made)))
        factorised *= 1 + bool(asks & {"spectra", "menus"}) + ("losses" in asks) * tried
    beside = trained.bytes
    if "gates" in asks:  # the output basis of every matrix
        beside += 4 * sum(rows * min(rows, columns) for rows, columns in map(_shape, made.values()))
    kept = 0
    if asks & {"losses", "gates"}:
        kept = sum(
            len(seen & _SQUARE) * 8 * width**2 + len(seen - _SQUARE) * 8 * width
            for width in widths.values()
        )
    moments = (1 + bool(seen)) * sum(
        2 * calibration * _reached(source, site) * width**2 for site, width in widths.items()
    )
    return CalibrationCost(
        block_bytes=2 * 4 * max(weights, default=0),
        gram_bytes=max(grams),
        workspace_bytes=max(
            (
                workspace_bytes(plan.out_features, plan.in_features, plan.module)
                for plan in made.values()
            ),
            default=0,
        ),
        model_bytes=4 * sum(map(math.prod, source.shapes.values())) + beside
        if whole or probed
        else 0,
        hidden_bytes=4 * streams * source.config.hidden_size,
        work_bytes=sum(gradients)
        + kept
        + spectra
        + (trained.records(stored, bases) if trained.left else stored + bases),
        forward_operations=_forward_operations(
            source,
            calibration,
            held_out,
            held_out - recipe.evaluation.samples,  # nothing comes after a window
            statistics=passes,
            gradients=bool(needs & GRADIENTS),
            errors=bool(made),
            projections=any(plan.projection for plan in caches.values()),
            sweeps=2 if trained.left else 1,
            whole=whole,
            probed=probed,
            probes=2 * len(layers),
        ),
        factor_operations=factorised + int(moments * squares),
    )


def _shape(plan: MatrixPlan) -> tuple[int, int]:
    return plan.out_features, plan.in_features


class _Trained(NamedTuple):
    """Parameters of all B and of all A that are fine-tuned."""

    left: int = 0
    right: int = 0

    @property
    def bytes(self) -> int:
        """On the device in fp32: both sides, and of one its gradient and its two moments."""
        return 4 * (self.left + self.right + 3 * max(self))

    def records(self, stored: int, bases: int) -> int:
        """In the work directory: both sides and the moments of one, beside the factors.

        Those of A are there until the end, when every factor lies there as it was and as it is.
        """
        both = self.left + self.right
        return max(
            stored + 4 * (both + 2 * self.left), 2 * stored + bases + 4 * (both + 2 * self.right)
        )


def _trained(made: Iterable[MatrixPlan]) -> _Trained:
    ranks = [(plan.rank or 0, plan) for plan in made]
    return _Trained(
        sum(rank * plan.out_features for rank, plan in ranks),
        sum(rank * plan.in_features for rank, plan in ranks),
    )


def _forward_operations(
    source: Source,
    calibration: int,
    held_out: int,
    scored: int,
    *,
    statistics: int,
    gradients: bool,
    errors: bool,
    projections: bool,
    sweeps: int,
    whole: int,
    probed: int,
    probes: int,
) -> int:
    """Two per weight and token: both streams advance, beside what each of the rest asks for.

    Gradients take a pass forward, one more and one back to the inputs. A second of the `sweeps` is
    that behind fine-tuning. `whole` are tokens that the whole model reads, `probed` those that it
    reads once, and again for each of the `probes`, whose logits are compared with the dense ones.
    """
    weights = sum(math.prod(s) * _reached(source, path) for path, s in source.linears().items())
    head = source.config.vocab_size * source.config.hidden_size
    passes = calibration * (statistics + 2 * sweeps + projections + 3 * gradients)
    passes += held_out * (sweeps * (errors + 2) + projections) + whole
    passes += (1 + probes) * probed
    heads = 2 * scored + 2 * calibration * gradients + whole + 2 * probes * probed
    return int(2 * (passes * weights + heads * head))


def _reached(source: Source, path: str) -> Fraction:
    """The fraction of the tokens that a linear layer sees: of a routed expert, on average."""
    if ".experts." not in path:
        return Fraction(1)
    return Fraction(source.config.num_experts_per_tok, source.config.num_experts)


def _operations(plan: MatrixPlan, width: int) -> int:
    smaller = min(plan.out_features, plan.in_features)
    products = 2 * plan.out_features * plan.in_features * (width + 2 * smaller)
    return products + _EIGH * smaller**3


def expected_seconds(cost: CalibrationCost) -> float:
    """The operations at the speed of two short matrix products on this machine, in seconds."""
    return cost.forward_operations / _speed(torch.float32) + cost.factor_operations / (
        _FACTOR_SHARE * _speed(torch.float64)
    )


def _speed(dtype: torch.dtype, size: int = 512) -> float:
    """Operations per second of a square matrix product, the best of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])
