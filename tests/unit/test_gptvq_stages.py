"""GPTVQ: every stage against its identity."""

import pytest
import torch
from grams import gram_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_compress.linalg.hessian import damped_hessian
from offline_compress.methods import codebook_update
from offline_compress.methods.codebook_update import rounded, updated
from offline_compress.methods.coordinate_descent import sweep
from offline_compress.methods.error_feedback import fed_back
from offline_compress.methods.strips import Strips, energy
from offline_compress.methods.weighted_kmeans import weighted_kmeans

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
