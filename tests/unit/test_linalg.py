"""Cholesky with damping, PSD spectra, and the basis that a truncation keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.linalg import (
    DAMPING_LADDER,
    cholesky,
    eigh,
    floored,
    left_of_gram,
    left_of_matrix,
    regressed,
    spectrum_of,
)


def gram_of(width, tokens, seed=0, scale=1.0):
    x = torch.randn(
        tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return scale * x.T @ x / tokens


def test_a_positive_definite_gram_needs_no_damping():
    gram = gram_of(24, 200)
    factor, damping = cholesky(gram)
    assert damping == 0
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor, factor.tril())


@given(
    width=st.integers(2, 24),
    tokens=st.integers(1, 8),
    power=st.integers(-20, 20),
    dead=st.integers(0, 3),
)
def test_a_singular_gram_of_any_scale_is_factored_within_its_damping(width, tokens, power, dead):
    gram = gram_of(width, tokens, scale=10.0**power)
    gram[:dead], gram[:, :dead] = 0, 0
    factor, damping = cholesky(gram)
    assert damping in DAMPING_LADDER
    scale = gram.diagonal().mean() or torch.tensor(1.0)
    difference = factor @ factor.T - gram
    assert torch.isfinite(factor).all()
    assert difference.abs().max() <= (damping + 1e-12) * scale * width


def test_damping_does_not_depend_on_scale():
    gram = gram_of(16, 4)
    damping = {cholesky(gram * 2.0**power).damping for power in (-60, 0, 60)}
    assert len(damping) == 1


def test_an_all_zero_gram_is_factored():
    assert torch.isfinite(cholesky(torch.zeros(5, 5)).factor).all()


def test_an_indefinite_gram_is_projected_first():
    gram = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    factor, damping = cholesky(gram)
    assert damping == DAMPING_LADDER[-1]
    assert torch.isfinite(factor).all()
    rebuilt = (factor @ factor.T).diagonal()
    torch.testing.assert_close(rebuilt, gram.diagonal().clamp_min(0) + 0.01, rtol=1e-9, atol=1e-9)


def test_the_spectrum_is_descending_non_negative_and_rebuilds_the_matrix():
    gram = gram_of(20, 7)
    values, vectors = eigh(gram)
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    torch.testing.assert_close((vectors * values) @ vectors.T, gram, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-180, 1.0, 1e180])
def test_the_spectrum_scales_with_the_matrix(scale):
    gram = gram_of(12, 40)
    torch.testing.assert_close(eigh(gram * scale).values / scale, eigh(gram).values)


@given(rows=st.integers(2, 20), columns=st.integers(2, 20), seed=st.integers(0, 99), data=st.data())
def test_the_basis_is_orthonormal_and_the_tail_is_that_of_the_singular_values(
    rows, columns, seed, data
):
    matrix = torch.randn(
        rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    rank = data.draw(st.integers(1, min(rows, columns)))
    kept = left_of_matrix(matrix, rank)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(kept.basis.T @ kept.basis, identity, rtol=0, atol=1e-10)
    squared = torch.linalg.svdvals(matrix).square()
    tail = float(squared[rank:].sum() / squared.sum())
    assert kept.loss == pytest.approx(tail, rel=1e-9, abs=1e-12)
    lost = matrix - kept.basis @ kept.basis.T @ matrix
    measured = float(lost.square().sum() / squared.sum())
    assert measured == pytest.approx(tail, rel=1e-7, abs=1e-12)
    assert left_of_gram(matrix @ matrix.T, rank).loss == pytest.approx(tail, rel=1e-9, abs=1e-12)


def test_a_rank_beyond_the_data_still_gives_an_orthonormal_basis():
    matrix = torch.zeros(9, 4, dtype=torch.float64)
    matrix[:, 0] = 1
    kept = left_of_matrix(matrix, 4)
    assert kept.loss == pytest.approx(0, abs=1e-14)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(kept.basis.T @ kept.basis, identity, rtol=0, atol=1e-12)


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_spectrum_of_a_matrix_is_that_of_its_singular_values(rows, columns, seed):
    matrix = torch.randn(
        rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    squared = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(
        spectrum_of(matrix), squared, rtol=1e-10, atol=1e-13 * float(squared[0])
    )


@given(
    scale=st.lists(st.just(0.0) | st.floats(1e-12, 1e12), min_size=1, max_size=12),
    power=st.sampled_from([-60, 0, 60]),
)
def test_floored_scales_are_positive_change_no_typical_one_and_do_not_depend_on_units(scale, power):
    scale = torch.tensor(scale, dtype=torch.float64)
    found = floored(scale)
    assert (found > 0).all()
    if scale.any():
        assert (found >= scale).all()
        assert torch.equal(found[scale >= scale.mean()], scale[scale >= scale.mean()])
        torch.testing.assert_close(floored(scale * 2.0**power), found * 2.0**power)
    else:
        assert (found == 1).all()


def test_regression_from_second_moments_is_least_squares_on_the_tokens():
    y, z = (torch.randn(300, width, dtype=torch.float64) for width in (7, 12))
    found, damping = regressed(y.T @ z, z.T @ z)
    wanted = torch.linalg.lstsq(z, y).solution.T
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert 0 < damping <= 1e-12


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_regression_on_a_singular_gram_stays_within_its_least_norm_solution(scale):
    """A ridge shrinks: its solution is never longer than the shortest without it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    z = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    found, _ = regressed(y.T @ z * scale, z.T @ z * scale)
    least = torch.linalg.lstsq(z, y, driver="gelsd").solution.T
    assert found.norm() <= least.norm() * (1 + 1e-3)
    torch.testing.assert_close(z @ found.T, y, rtol=0, atol=1e-6)


def test_regression_without_data_is_zero():
    found, damping = regressed(torch.zeros(3, 4), torch.zeros(4, 4))
    assert not found.any()
    assert damping > 0
