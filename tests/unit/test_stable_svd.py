"""The gradient of a soft truncation: against finite differences, and finite where none exists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.linalg.stable_svd import GatedSvd, soft_gate, soft_truncated

SHAPES = [(7, 5), (5, 7), (6, 6)]
EPS = torch.finfo(torch.float64).eps


def orthonormal(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=g)).Q


def matrix_of(values, shape, seed=0):
    """A matrix [T, m] of these min(T, m) singular values."""
    rank = min(shape)
    left, right = orthonormal(shape[0], rank, seed), orthonormal(shape[1], rank, seed + 1)
    values = torch.tensor(values[:rank], dtype=torch.float64)
    return (left * values @ right.T).requires_grad_()


def slope_of(matrix, gates, seed=5):
    g = torch.Generator().manual_seed(seed)
    upstream = torch.randn(matrix.shape, dtype=torch.float64, generator=g).to(matrix)
    (slope,) = torch.autograd.grad((GatedSvd.apply(matrix, gates) * upstream).sum(), matrix)
    return slope, upstream


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_that_of_finite_differences_and_of_autograd(shape):
    """At most 2 per cent apart, where 1000 terms of the series leave out 0.98^2000 < 1e-17."""
    matrix = matrix_of([3.0, 2.5, 2.45, 1.0, 0.98, 0.3], shape)
    gates = torch.tensor([0.9, 0.95, 0.2, 0.4, 0.1, 0.7][: min(shape)]).double().requires_grad_()
    assert torch.autograd.gradcheck(GatedSvd.apply, (matrix, gates))
    slope, upstream = slope_of(matrix, gates)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    (exact,) = torch.autograd.grad((left * (gates * values) @ right * upstream).sum(), matrix)
    # Both divide by differences of squares as small as 0.04: a few hundred roundings of 1.
    torch.testing.assert_close(slope, exact, rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiny", [0.0, 1e-18])
def test_equal_and_tiny_singular_values_that_share_a_gate_have_the_exact_gradient(shape, tiny):
    """Y is smooth there, though neither U nor V is."""
    matrix = matrix_of([2.0, 2.0, 1.0, tiny, tiny, tiny], shape)
    gates = torch.tensor([0.9, 0.9, 0.5, 0.2, 0.2, 0.2][: min(shape)]).double()
    assert torch.autograd.gradcheck(lambda matrix: GatedSvd.apply(matrix, gates), matrix)


@given(
    values=st.lists(st.sampled_from([0.0, 1e-30, 1e-9, 1.0, 1.0 + 1e-12, 1.001, 1e9]), min_size=7),
    shape=st.sampled_from([(7, 9), (9, 7), (7, 7)]),
    position=st.integers(0, 7),
    wide=st.booleans(),
)
def test_where_y_has_no_derivative_the_gradient_is_bounded(values, shape, position, wide):
    """At most 1000 terms, twice, of entries of the upstream gradient, for each pair of ranks."""
    matrix = matrix_of(sorted(values, reverse=True), shape).detach()
    matrix = matrix.to(torch.float64 if wide else torch.float32).requires_grad_()
    gates = soft_gate(torch.tensor(float(position)), 7, beta=50.0).to(matrix)
    slope, upstream = slope_of(matrix, gates)
    assert torch.isfinite(slope).all()
    assert slope.norm() <= (2 * 1000 + 3) * upstream.norm()


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_the_gradient_does_not_depend_on_the_scale_of_the_matrix(scale):
    """Y is homogeneous: constants added to singular values would show."""
    gates = soft_gate(torch.tensor(2.7, dtype=torch.float64), 5, beta=2.0)
    matrix = matrix_of([3.0, 2.0, 1.9, 1e-3, 0.0], (8, 5))
    slope, _ = slope_of(matrix, gates)
    scaled, _ = slope_of((matrix.detach() * scale).requires_grad_(), gates)
    torch.testing.assert_close(scaled, slope, rtol=1e-6, atol=1e-9)


def test_a_position_has_the_gradient_of_finite_differences():
    matrix = matrix_of([3.0, 2.0, 1.5, 0.7, 0.2], (9, 5))
    position = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *of: soft_truncated(*of, beta=1.5), (matrix, position))


@given(position=st.integers(0, 9))
def test_a_sharp_gate_keeps_as_many_ranks_as_its_position(position):
    gates = soft_gate(torch.tensor(float(position)), 9, beta=1e3)
    assert gates.tolist() == [1.0] * position + [0.0] * (9 - position)


def test_a_gate_is_open_far_below_its_position_closed_far_above_and_adds_up_to_it():
    for position in (20.0, 20.25, 20.5):
        gates = soft_gate(torch.tensor(position, dtype=torch.float64), 40, beta=1.0)
        assert (gates.diff() <= 0).all()
        # Half a period off, the sum of a logistic of width 1 / (2 beta) deviates by its Fourier
        # coefficient, pi / (beta sinh(pi^2 / beta)) < 1e-3.
        assert abs(float(gates.sum()) - position) < 1e-3
    assert (soft_gate(torch.tensor(60.0), 40, beta=1.0) == 1).all()
    assert (soft_gate(torch.tensor(-20.0), 40, beta=1.0) == 0).all()


def test_half_precision_is_truncated_in_single_and_returned_as_it_came():
    matrix = matrix_of([3.0, 2.0, 1.5, 0.7, 0.2], (9, 5)).detach()
    position = torch.tensor(2.5)
    half = soft_truncated(matrix.bfloat16(), position, beta=2.0)
    single = soft_truncated(matrix.bfloat16().float(), position, beta=2.0)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, single.bfloat16())


def test_no_tokens_are_no_tokens():
    assert soft_truncated(torch.empty(0, 4), torch.tensor(2.0), beta=1.0).shape == (0, 4)
