"""GPTVQ: every stage against its identity, the whole against plain rounding, degenerate inputs."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.linalg.hessian import damped_hessian
from offline_compress.methods import Block, Layer, codebook_update, strips
from offline_compress.methods.codebook_update import rounded, updated
from offline_compress.methods.coordinate_descent import sweep
from offline_compress.methods.error_feedback import fed_back
from offline_compress.methods.gptvq import INDEX_BITS, Gptvq
from offline_compress.methods.strips import Strips, energy, strips_of
from offline_compress.methods.weighted_kmeans import weighted_kmeans
from vllm_svd.format import Codebook


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(width, correlation=0.9, outlier=1.0):
    """Neighbouring inputs are correlated; one channel is larger than the others."""
    place = torch.arange(width, dtype=torch.float64)
    gram = correlation ** (place[:, None] - place).abs()
    scale = torch.ones(width, dtype=torch.float64)
    scale[width // 3] = outlier
    return scale[:, None] * gram * scale


def module_of(rows, columns, dim=2, bits=4, group_rows=None, group_columns=64):
    return Codebook(
        out_features=rows,
        in_features=columns,
        dim=dim,
        index_bits=bits,
        group_rows=group_rows or rows,
        group_columns=group_columns,
    )


def quantized(weight, gram, module, **options):
    statistics = LayerStatistics(shifted_gram=gram)
    return Gptvq(**options).quantize(weight, statistics, module)


# The factor that stands in for the inverse Hessian.


@settings(max_examples=40)
@given(width=st.integers(1, 20), tokens=st.integers(1, 30), power=st.integers(-10, 10))
def test_the_upper_factor_and_the_precisions_are_those_of_the_damped_gram(width, tokens, power):
    x = normal(tokens, width) * 10.0**power
    gram = x.T @ x / tokens
    matrix, factor, precisions, damping = damped_hessian(gram, 0.01)
    assert damping == 0.01
    expected = gram + 0.01 * gram.diagonal().mean() * torch.eye(width).double()
    unit = float(expected.diagonal().max())
    assert (matrix - expected).abs().max() <= 1e-15 * unit
    assert (factor @ factor.T - expected).abs().max() <= 1e-14 * width * unit
    assert torch.equal(factor, factor.triu())
    solved = torch.linalg.solve(matrix, torch.eye(width).double())
    torch.testing.assert_close(precisions, 1 / solved.diagonal(), rtol=1e-9, atol=0)


def test_a_gram_that_needs_more_damping_than_asked_gets_and_reports_it():
    x = normal(1, 6)
    matrix, factor, _, damping = damped_hessian(x.T @ x, 0.0)
    assert damping > 0
    assert (factor @ factor.T - matrix).abs().max() <= 1e-14 * matrix.abs().max()
    identity = damped_hessian(torch.zeros(4, 4), 0.25)
    torch.testing.assert_close(identity.matrix, 1.25 * torch.eye(4, dtype=torch.float64))


# Error feedback.


def compensated(weights, hessian, codebooks, dim, exact=True, full=True):
    """Feedback as the papers write it, with the inverse Hessian and weights that move.

    `exact` propagates -E (H^-1_PP)^-1 H^-1_PF; the published update takes the d columns of a
    vector one beside the other. `full` assigns in the metric (H^-1_PP)^-1 instead of its diagonal.
    """
    columns = weights.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    moved, found = weights.clone(), []
    for first in range(0, columns, dim):
        here, after = slice(first, first + dim), slice(first + dim, columns)
        own = upper[here, here]
        difference = moved[:, None, here] - codebooks
        scaled = (
            torch.linalg.solve_triangular(own, difference, upper=True, left=False)
            if full
            else difference / own.diagonal()
        )
        chosen = scaled.square().sum(2).argmin(1)
        error = moved[:, here] - codebooks[chosen]
        scaled = (
            torch.linalg.solve_triangular(own, error, upper=True, left=False)
            if exact
            else error / own.diagonal()
        )
        moved[:, after] -= scaled @ upper[here, after]
        found.append(chosen)
    return torch.stack(found, 1)


def objective(weights, hessian, codebooks, indices):
    error = weights - codebooks[indices].flatten(1)
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_feedback_is_that_of_the_papers_with_the_coupling_inside_a_vector(dim, width):
    weights, hessian = normal(20, 8 * dim), damped_hessian(gram_of(8 * dim), 0.01)
    codebooks = normal(6, dim, seed=1)
    found = fed_back(weights[None], hessian.factor, dim, width, lambda *_: codebooks[None])
    expected = compensated(weights, hessian.matrix, codebooks, dim)
    assert torch.equal(found.indices[0], expected)


@pytest.mark.parametrize("dim", [1, 2])
def test_each_assignment_is_the_best_when_all_later_columns_are_free(dim):
    """Against brute force: every centroid in turn, and least squares for the columns after it."""
    columns = 3 * dim
    weights, hessian = normal(5, columns), damped_hessian(gram_of(columns, 0.8), 0.01)
    codebooks = normal(4, dim, seed=1)
    seen = []

    def codebooks_of(_, moved):
        seen.append(moved[0])
        return codebooks[None]

    found = fed_back(weights[None], hessian.factor, dim, 1, codebooks_of).indices[0]
    root = torch.linalg.cholesky(hessian.matrix, upper=True)  # ||E root^T||^2 = tr(E H E^T)
    for row in range(len(weights)):
        errors = torch.zeros(columns, dtype=torch.float64)
        for vector in range(3):
            here, after = slice(vector * dim, vector * dim + dim), (vector + 1) * dim
            costs = []
            for centroid in codebooks:
                errors[here] = weights[row, here] - centroid
                fixed = root[:, :after] @ errors[:after]
                free = torch.linalg.lstsq(root[:, after:], -fixed[:, None]).solution
                costs.append(float((fixed + (root[:, after:] @ free)[:, 0]).square().sum()))
            assert int(found[row, vector]) == min(range(4), key=costs.__getitem__)
            errors[here] = weights[row, here] - codebooks[found[row, vector]]
            if vector < 2:  # and the next codebook is made of the conditional optimum
                fixed = root[:, :after] @ errors[:after]
                free = torch.linalg.lstsq(root[:, after:], -fixed[:, None]).solution[:, 0]
                best = weights[row, after : after + dim] - free[:dim]
                torch.testing.assert_close(seen[vector + 1][row], best, rtol=0, atol=1e-9)


def test_the_exact_update_loses_less_than_the_published_parallel_one():
    weights, hessian = normal(256, 64), damped_hessian(gram_of(64), 0.01).matrix
    points = weights[None].reshape(1, 256, 32, 2)
    codebooks = weighted_kmeans(points, torch.ones(32, 2).double(), 16, 100)[0]
    exact, metric, published = (
        objective(weights, hessian, codebooks, compensated(weights, hessian, codebooks, 2, *how))
        for how in ((True, True), (True, False), (False, False))
    )
    assert exact < metric < published
    assert exact < 0.75 * published


# k-means.


@settings(max_examples=50)
@given(
    dim=st.sampled_from([1, 2, 4]), rows=st.integers(1, 12), vectors=st.integers(1, 6),
    count=st.integers(1, 9), seed=st.integers(0, 5),
)  # fmt: skip
def test_centroids_are_weighted_means_or_points_and_never_worse_than_one_mean(
    dim, rows, vectors, count, seed
):
    points = normal(1, rows, vectors, dim, seed=seed)
    weights = normal(vectors, dim, seed=seed + 1).square() + 0.1
    centroids = weighted_kmeans(points, weights, count, 100)
    assert centroids.shape == (1, count, dim)

    def lost(of):
        distance = ((points[0, :, :, None] - of[0]).square() * weights[:, None]).sum(3)
        return float(distance.amin(2).sum())

    mass = weights.expand(rows, -1, -1)
    mean = ((points[0] * mass).sum((0, 1)) / mass.sum((0, 1)))[None, None]
    total = lost(torch.zeros(1, 1, dim))
    assert lost(centroids) <= lost(mean) * (1 + 1e-6) + 1e-15 * total
    if count >= rows * vectors:
        assert lost(centroids) <= 1e-5 * total
    scaled = weighted_kmeans(points * 2.0**40, weights * 2.0**-60, count, 100)
    assert torch.equal(scaled, centroids * 2.0**40)


# Codebooks and assignments under the exact objective.


def some_strips(strips=2, rows=6, columns=12, dim=2, count=4, width=3):
    weights = normal(strips, rows, columns)
    indices = torch.randint(
        count, (strips, rows, columns // dim), generator=torch.Generator().manual_seed(2)
    )
    blocks = -(-columns // (dim * width))
    return weights, Strips(normal(strips, blocks, count, dim, seed=3), indices, width)


def test_the_update_is_the_least_squares_solution_of_all_codebooks_at_once(monkeypatch):
    monkeypatch.setattr(codebook_update, "_TOLERANCE", 1e-9)
    weights, found = some_strips()
    hessian = damped_hessian(gram_of(12), 0.01)
    unknowns = found.codebooks[0].numel()  # conjugate gradients need no more steps
    solved = updated(weights, hessian.matrix, found, steps=unknowns)
    for strip in range(2):
        one = Strips(found.codebooks[strip : strip + 1], found.indices[strip : strip + 1], 3)
        units = torch.eye(unknowns, dtype=torch.float64)
        design = torch.stack(
            [
                (one.with_codebooks(u.view_as(one.codebooks)).dense()[0] @ hessian.factor).flatten()
                for u in units
            ],
            dim=1,
        )
        target = (weights[strip] @ hessian.factor).flatten()
        best = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
        least = float((design @ best - target[:, None]).square().sum())
        error = weights[strip : strip + 1] - solved.dense()[strip : strip + 1]
        assert float(energy(error, hessian.matrix)) == pytest.approx(least, rel=1e-9)


def test_no_step_of_the_update_and_no_sweep_raises_the_objective_of_any_strip():
    weights, found = some_strips(rows=20, columns=24, count=8, width=4)
    hessian = damped_hessian(gram_of(24, outlier=100.0), 0.01).matrix
    before = energy(weights - found.dense(), hessian)
    for steps in range(1, 8):
        after = energy(weights - updated(weights, hessian, found, steps).dense(), hessian)
        assert (after <= before * (1 + 1e-12)).all()
        before = after
    swept = updated(weights, hessian, found, 8)
    for _ in range(20):
        swept = sweep(weights, hessian, swept)
        after = energy(weights - swept.dense(), hessian)
        assert (after <= before * (1 + 1e-12)).all()
        before = after
    assert torch.equal(sweep(weights, hessian, swept).indices, swept.indices)
    for row, vector in ((0, 0), (7, 5), (19, 11)):  # no single reassignment can lower it further
        for centroid in range(8):
            indices = swept.indices.clone()
            indices[:, row, vector] = centroid
            other = Strips(swept.codebooks, indices, 4)
            assert (energy(weights - other.dense(), hessian) >= after * (1 - 1e-12)).all()


def test_int8_raises_the_objective_by_no_more_than_its_steps():
    """|delta| is half a step of the largest centroid / 127; the norm under H is a norm."""
    weights, found = some_strips(rows=20, columns=24, count=8, width=12)
    hessian = damped_hessian(gram_of(24), 0.01).matrix
    int8, scales = rounded(weights, hessian, found)
    stored = found.with_codebooks(int8 * scales.double()[..., None, None])
    half = found.codebooks.abs().amax((1, 2, 3)) / 127 / 2 * (1 + 1e-6)
    largest = torch.linalg.eigvalsh(hessian)[-1] * 20 * 24 * half.square()
    before = energy(weights - found.dense(), hessian)
    after = energy(weights - stored.dense(), hessian)
    assert (after.sqrt() <= before.sqrt() + largest.sqrt()).all()


def test_the_scale_of_a_block_is_the_best_given_the_rounding_of_the_blocks_before():
    weights, found = some_strips(strips=40, rows=4, columns=24, count=4, width=6)
    hessian = damped_hessian(gram_of(24, 0.99), 0.01).matrix
    found = updated(weights, hessian, found, 50)  # from here on only the roundings matter
    int8, scales = rounded(weights, hessian, found)
    stored = int8 * scales.double()[..., None, None]
    chosen = energy(weights - found.with_codebooks(stored).dense(), hessian)
    used = [
        torch.stack([(strip == centroid).any() for centroid in range(4)])
        for strip in found.indices[..., 6:]
    ]
    exact = torch.where(torch.stack(used)[..., None], found.codebooks[:, 1], 0.0)
    for reach in codebook_update._REACHES:
        scale = (reach * exact.abs().amax((1, 2)) / 127).float().double()[:, None, None]
        other = stored.clone()
        other[:, 1] = (exact / scale).round().clamp(-127, 127) * scale
        lost = energy(weights - found.with_codebooks(other).dense(), hessian)
        assert (lost >= chosen * (1 - 1e-12)).all()


# The whole method.


@pytest.mark.parametrize(("dim", "bits"), [(1, 3), (2, 4), (2, 6), (4, 6)])
@pytest.mark.parametrize("columns", [64, 58])
def test_the_objective_falls_at_every_stage(dim, bits, columns):
    weight, gram = normal(60, columns), gram_of(columns, outlier=10.0)
    module = module_of(60, columns, dim, bits, group_rows=25, group_columns=32)
    nearest, feedback, update, descent, int8 = Gptvq().objectives(weight, gram, module)
    assert nearest > feedback > update > descent > 0
    assert int8 < 1.1 * descent
    found = quantized(weight, gram, module)
    hessian = damped_hessian(gram, 0.01).matrix
    assert found.factors.output_error(weight, hessian) == pytest.approx(int8, rel=1e-9)
    assert found.loss == pytest.approx(found.factors.output_error(weight, gram), rel=1e-12)
    assert found.damping == 0.01


@settings(max_examples=20)
@given(
    dim=st.sampled_from([1, 2, 4]), bits=st.integers(1, 5), vectors=st.integers(2, 10),
    seed=st.integers(0, 20),
)  # fmt: skip
def test_few_distinct_values_are_restored_exactly(dim, bits, vectors, seed):
    """At most 2^bits vectors of whole steps, the largest of which is 127."""
    columns = dim * vectors
    generator = torch.Generator().manual_seed(seed)
    values = 8 * torch.randint(-15, 16, (1 << bits, dim), generator=generator)
    values[0] = 127
    chosen = torch.randint(1 << bits, (24, vectors), generator=generator)
    chosen[:, 0] = 0
    weight = (values[chosen].flatten(1) * 2.0**-9).to(torch.bfloat16)
    module = module_of(24, columns, dim, bits, group_columns=256)
    found = quantized(weight, gram_of(columns, 0.5), module)
    assert torch.equal(found.factors.dense(), weight.double())
    assert found.loss == 0


def test_the_error_falls_with_every_bit():
    weight, gram = normal(64, 32), gram_of(32)
    for dim, bits in ((1, range(1, 7)), (2, range(1, 8)), (4, range(1, 8, 2))):
        losses = [quantized(weight, gram, module_of(64, 32, dim, b)).loss for b in bits]
        assert losses == sorted(losses, reverse=True)


def rounded_to_nearest(weight, bits, group):
    """Symmetric uniform steps, the scale of every `group` columns of a row its largest entry."""
    largest = 2 ** (bits - 1) - 0.5
    groups = weight.reshape(len(weight), -1, group)
    scale = groups.abs().amax(2, keepdim=True) / largest
    steps = (groups / scale - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
    return (steps * scale).flatten(1)


@pytest.mark.parametrize(("dim", "bits"), [(1, 2), (2, 4), (4, 8), (1, 3), (2, 6), (1, 4)])
def test_it_beats_rounding_to_nearest_that_has_more_bytes(dim, bits):
    weight, gram = normal(256, 128), gram_of(128)
    module = Gptvq(dim=dim, index_bits=bits).sized(256, 128, dim, bits)
    plain = bits // dim
    group = 16  # columns that share an fp16 scale: one bit more per weight
    plain_bytes = 256 * 128 * plain // 8 + 256 * 128 // group * 2
    assert module.bytes(2) <= plain_bytes
    error = weight - rounded_to_nearest(weight, plain, group)
    lost = float(energy(error[None], gram) / energy(weight[None], gram))
    assert quantized(weight, gram, module).loss < 0.5 * lost


def gram_few_tokens(width):
    x = normal(width // 4, width)
    return x.T @ x / len(x)


def dead(gram):
    gram[3:7], gram[:, 3:7] = 0, 0
    return gram


GRAMS = {
    "ordinary": gram_of,
    "zero": lambda width: torch.zeros(width, width),
    "few tokens": gram_few_tokens,
    "dead channels": lambda width: dead(gram_of(width)),
    "constant features": lambda width: torch.ones(width, width),
    "outlier 1000x": lambda width: gram_of(width, outlier=1e3),
    "tiny": lambda width: gram_of(width) * 1e-30,
}
WEIGHTS = {
    "ordinary": lambda weight: weight,
    "zero": torch.zeros_like,
    "one huge row": lambda weight: torch.cat([weight[:-1], 1e3 * weight[-1:]]),
    "bf16 with zeros": lambda weight: (weight * (weight > 0)).to(torch.bfloat16),
    "constant": torch.ones_like,
}


@pytest.mark.parametrize(
    ("gram", "weight", "damping"),
    [
        *((gram, weight, 0.01) for gram in GRAMS for weight in WEIGHTS),
        *((gram, "one huge row", 0.0) for gram in GRAMS),
    ],
)
def test_degenerate_inputs_give_finite_weights_of_the_planned_size(gram, weight, damping):
    second, matrix = GRAMS[gram](39), WEIGHTS[weight](normal(21, 39))
    module = module_of(21, 39, dim=2, bits=4, group_rows=8, group_columns=16)
    found = quantized(matrix, second, module, damping=damping)
    assert found.factors.config() == module
    dense = found.factors.dense()
    assert dense.isfinite().all()
    assert 0 <= found.loss < 0.2
    assert found.damping >= damping
    singular = {"few tokens", "dead channels", "constant features"}
    assert (found.damping > 0) == (damping > 0 or gram in singular)
    if weight == "zero":
        assert not dense.any()
    if weight == "one huge row":  # its strip suffers, the others do not
        metric = second if second.any() else torch.eye(39)
        lost, total = (energy(x[None, :16], metric.double()) for x in (matrix - dense, matrix))
        assert lost < 0.2 * total


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_matrices_smaller_than_a_group_or_a_vector(shape, dim):
    weight = normal(*shape)
    module = module_of(*shape, dim=dim, bits=6, group_columns=256)
    found = quantized(weight, gram_of(shape[1]), module)
    assert found.factors.config() == module
    # 64 centroids for at most 45 vectors: only the int8 steps are lost
    step = float(weight.abs().max()) / 127
    assert (weight - found.factors.dense()).abs().max() <= step


def test_strips_are_those_of_the_matrix_however_many_at_once(monkeypatch):
    weight = normal(23, 10).to(torch.bfloat16)
    module = module_of(23, 10, dim=4, group_rows=5, group_columns=8)
    for at_once in (1, 2 * 5 * 12, 1 << 22):
        monkeypatch.setattr(strips, "_AT_ONCE", at_once)
        pieces = list(strips_of(weight, module))
        assert sum(len(piece) for piece in pieces) == module.groups[0]
        rows = torch.cat([piece.flatten(0, 1) for piece in pieces])
        assert torch.equal(rows[:, :10], weight.double())
        assert not rows[:, 10:].any()
    monkeypatch.setattr(strips, "_AT_ONCE", 1)
    weight, gram = normal(60, 32), gram_of(32)
    module = module_of(60, 32, group_rows=25)
    one_by_one = quantized(weight, gram, module).loss
    monkeypatch.undo()
    assert one_by_one == pytest.approx(quantized(weight, gram, module).loss, rel=0.1)


# Sizes.

LAYER = Layer("l", {"l.up": (96, 64), "l.down": (40, 130)}, 4, 2, 16, item_bytes=2)


@given(
    share=st.fractions(Fraction(1, 100), Fraction(99, 100)), dim=st.sampled_from([1, 2, 4, None])
)
def test_a_share_buys_the_most_bits_that_fit(share, dim):
    method = Gptvq(dim=dim, group_columns=32)
    for path, module in method.modules_at(LAYER, dict.fromkeys(LAYER.shapes, share)).items():
        rows, columns = LAYER.shapes[path]
        limit = share * LAYER.dense_bytes(path)
        offers = [
            method.sized(rows, columns, d, bits)
            for d in ((dim,) if dim else INDEX_BITS)
            for bits in range(1, INDEX_BITS[d] + 1)
        ]
        fitting = [o for o in offers if o.bytes(2) <= limit]
        assert isinstance(module, Codebook)
        if not fitting:
            assert module.bytes(2) == min(o.bytes(2) for o in offers)
            continue
        assert module in fitting
        rate = Fraction(module.index_bits, module.dim)
        assert all(Fraction(o.index_bits, o.dim) <= rate for o in fitting)
        assert all(o.dim <= module.dim for o in fitting if Fraction(o.index_bits, o.dim) == rate)


@given(
    rows=st.integers(1, 300), columns=st.integers(1, 300), bits=st.integers(1, 8),
    dim=st.sampled_from([1, 2, 4]), overhead=st.floats(0.01, 2),
)  # fmt: skip
def test_codebooks_stay_below_the_overhead_unless_there_is_one_strip(
    rows, columns, bits, dim, overhead
):
    module = Gptvq(overhead=overhead).sized(rows, columns, dim, bits)
    stored = module.parts()
    codebook_bits = 8 * (stored["codebooks"].bytes(2) + stored["scales"].bytes(2))
    assert module.groups[0] == 1 or codebook_bits <= overhead * rows * columns * (1 + 1e-12)


def test_options_of_the_user_are_kept_within_the_share():
    path = {"l.up": Fraction(1, 2)}
    assert Gptvq(index_bits=3).modules_at(LAYER, path)["l.up"].index_bits == 3
    chosen = Gptvq(group_rows=7, group_columns=16).modules_at(LAYER, path)["l.up"]
    assert (chosen.group_rows, chosen.group_columns) == (7, 16)
    tight = {"l.up": Fraction(1, 8)}
    assert Gptvq(index_bits=8).modules_at(LAYER, tight)["l.up"].index_bits < 8
    assert "all of it" in Gptvq().modules_at(LAYER, {"l.up": Fraction(1)})["l.up"]
    tiny = Layer("l", {"l.up": (2, 2)}, 1, 1, 2, item_bytes=2)
    assert "the matrix 8" in Gptvq().modules_at(tiny, {"l.up": Fraction(1, 2)})["l.up"]


def test_a_block_is_compressed_as_planned_from_the_moments_it_asks_for():
    weights = {path: normal(*shape) for path, shape in LAYER.shapes.items()}
    for sequential, moment in ((True, "shifted_gram"), (False, "gram")):
        method = Gptvq(sequential=sequential)
        assert method.needs == {moment}
        statistics = {
            path: LayerStatistics(**{moment: gram_of(shape[1])})
            for path, shape in LAYER.shapes.items()
        }
        wanted = method.modules_at(LAYER, dict.fromkeys(LAYER.shapes, Fraction(1, 4)))
        block = Block(LAYER, weights, dict.fromkeys(LAYER.shapes), statistics)
        made = method.compress(block, wanted).matrices
        assert {path: found.factors.config() for path, found in made.items()} == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 2, "index_bits": 9}, "index_bits 9 exceeds 8"),
        ({"dim": 4, "group_columns": 30}, "take 32"),
        ({"dim": None, "group_columns": 6}, "no multiple of dim 4"),
        ({"dim": 3}, "dim"),
        ({"damping": float("nan")}, "damping"),
        ({"overhead": 0}, "overhead"),
    ],
)
def test_options_that_the_format_has_no_room_for_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        Gptvq(**options)
