"""Identities and orderings of the methods that truncate one matrix at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.factors import LowRankFactors
from offline_compress.linalg import left_of_gram
from offline_compress.methods.asvd import Asvd
from offline_compress.methods.fwsvd import Fwsvd
from offline_compress.methods.gfwsvd import Gfwsvd
from offline_compress.methods.svd import Svd
from offline_compress.methods.svd_llm import SvdLlm, input_form, output_form
from offline_compress.methods.svd_llm_v2 import SvdLlmV2

UPDATED = SvdLlm(update=True)
UNSHRUNK = Gfwsvd(input_shrinkage=0, output_shrinkage=0)
SCALED = (Asvd(), Asvd(scaling="abs_max"), Fwsvd())
TRUNCATIONS = (Svd(), *SCALED, SvdLlm(), SvdLlmV2(), Gfwsvd(), UNSHRUNK)
METHODS = (*TRUNCATIONS, UPDATED)
SHAPES = ((24, 40), (32, 32), (48, 20))

of_truncations = pytest.mark.parametrize("method", TRUNCATIONS, ids=repr)
of_methods = pytest.mark.parametrize("method", METHODS, ids=repr)
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width, tokens=400, seed=1):
    """Vectors [tokens, width] with a decaying, rotated spectrum and channels of unequal scale."""
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -1.0
    rotation, _ = torch.linalg.qr(normal(width, width, seed=seed))
    channels = torch.exp(normal(width, seed=seed + 1))
    return normal(tokens, width, seed=seed + 2) * spectrum @ rotation * channels


def statistics_of(x, g):
    """Of inputs [tokens, n] and output gradients [tokens, m], a sample per token.

    x' is x mixed with itself a token later, and weaker.
    """
    shifted = 0.9 * x + 0.3 * x.roll(1, 0)
    return LayerStatistics(
        gram=x.T @ x / len(x),
        tokens=len(x),
        mean_abs=x.abs().mean(0),
        max_abs=x.abs().amax(0),
        shifted_gram=shifted.T @ shifted / len(x),
        fisher=(g.square().sum(1, keepdim=True) * x.square()).mean(0),
        output_gram=g.T @ g / len(g),
    )


def layer(shape, seed=0):
    """A weight and its statistics."""
    rows, columns = shape
    g = correlated(rows, seed=seed + 500)
    return normal(rows, columns, seed=seed), statistics_of(correlated(columns, seed=seed + 1), g)


def metric_of(method, statistics, damping=0.0):
    """Y [m, m] and X [n, n]: the method minimises tr(Y E X E^T)."""
    inputs, outputs = statistics.gram, torch.eye(len(statistics.output_gram)).double()
    match method:
        case Svd():
            inputs = torch.eye(len(inputs)).double()
        case Asvd() | Fwsvd():
            inputs = torch.diag(method.scale(statistics).square())
        case SvdLlm(update=True):
            inputs = statistics.shifted_gram
        case Gfwsvd():
            inputs = shrunk(inputs, method.input_shrinkage)
            outputs = shrunk(statistics.output_gram, method.output_shrinkage)
            smaller = outputs if len(outputs) <= len(inputs) else inputs
            smaller.diagonal().add_(damping * smaller.diagonal().mean())
    return outputs, inputs


def shrunk(gram, share):
    return (1 - share) * gram + share * gram.diagonal().mean() * torch.eye(len(gram)).double()


def energy(matrix, metric):
    outputs, inputs = metric
    return float((outputs @ matrix @ inputs * matrix).sum())


def lost(weight, factors, metric):
    return energy(weight - factors.dense(), metric) / energy(weight, metric)


@of_methods
@of_shapes
def test_full_rank_reproduces_the_weight(method, shape):
    weight, statistics = layer(shape)
    found = method.factorize(weight, statistics, min(shape))
    torch.testing.assert_close(found.factors.dense(), weight, rtol=0, atol=1e-9)
    assert found.loss == pytest.approx(0, abs=1e-14)


@of_truncations
@given(rows=st.integers(2, 30), columns=st.integers(2, 30), seed=st.integers(0, 99), data=st.data())
def test_the_loss_is_the_dropped_tail_of_the_spectrum_and_the_loss_measured(
    method, rows, columns, seed, data
):
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, statistics = layer((rows, columns), seed)
    found, spectrum = (
        method.factorize(weight, statistics, rank),
        method.spectrum(weight, statistics),
    )
    metric = metric_of(method, statistics)
    assert found.damping == 0
    assert found.loss == pytest.approx(lost(weight, found.factors, metric), rel=1e-6, abs=1e-12)
    tail = float(spectrum[rank:].sum() / spectrum.sum())
    assert found.loss == pytest.approx(tail, rel=1e-6, abs=1e-12)
    assert spectrum.shape == (min(rows, columns),)
    assert (spectrum.diff() <= 0).all()
    assert float(spectrum.sum()) == pytest.approx(energy(weight, metric), rel=1e-9)
    A, B = found.factors.A, found.factors.B
    assert (B.shape, A.shape) == ((rows, rank), (rank, columns))
    unit = A.T if isinstance(method, Gfwsvd) and rows > columns else B
    torch.testing.assert_close(unit.norm(dim=0), torch.ones(rank).double())


@of_truncations
@of_shapes
def test_no_other_factors_of_the_rank_are_better_in_the_method_s_own_metric(method, shape):
    rank = min(shape) // 3
    weight, statistics = layer(shape)
    metric = metric_of(method, statistics)
    outputs, _ = metric
    best = method.factorize(weight, statistics, rank)
    A, B = best.factors.A, best.factors.B
    for seed in range(25):
        left, right = normal(shape[0], rank, seed=seed), normal(rank, shape[1], seed=seed)
        near = B + 0.1 * B.norm() / left.norm() * left
        others = [
            LowRankFactors(A=torch.linalg.solve(B.T @ outputs @ B, B.T @ outputs @ weight), B=B)
            for B in (left, near)
        ]
        others.append(LowRankFactors(A=A + 1e-3 * A.norm() / right.norm() * right, B=B))
        others.append(LowRankFactors(A=A, B=B + 1e-3 * B.norm() / left.norm() * left))
        assert all(lost(weight, other, metric) > best.loss for other in others)


@of_shapes
def test_what_knows_more_of_the_data_loses_less_of_the_output(shape):
    rank = min(shape) // 3
    for seed in range(8):
        weight, statistics = layer(shape, seed)
        whitened, mean, largest, plain = (
            method.factorize(weight, statistics, rank).factors.output_error(weight, statistics.gram)
            for method in (SvdLlm(), Asvd(), Asvd(scaling="abs_max"), Svd())
        )
        assert whitened < mean < plain
        assert whitened < largest < plain


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
def test_both_forms_of_svd_llm_are_its_second_version_and_gfwsvd_without_gradients(
    rows, columns, seed, data
):
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, known = layer((rows, columns), seed)
    blind = LayerStatistics(gram=known.gram, output_gram=torch.eye(rows).double())
    outer = output_form(weight, known.gram, rank)
    others = (
        input_form(weight, known.gram, rank),
        SvdLlmV2().factorize(weight, known, rank),
        UNSHRUNK.factorize(weight, blind, rank),
        Gfwsvd(input_shrinkage=0, output_shrinkage=1).factorize(weight, known, rank),
    )
    for other in others:
        assert other.loss == pytest.approx(outer.loss, rel=1e-6, abs=1e-12)
        torch.testing.assert_close(
            other.factors.dense() @ known.gram,
            outer.factors.dense() @ known.gram,
            rtol=0,
            atol=1e-6 * float(known.gram.diagonal().max()),
        )


@of_shapes
def test_metrics_without_data_are_plain_svd(shape):
    weight, known = layer(shape)
    flat = LayerStatistics(fisher=torch.full((shape[1],), 1e-9).double())
    plain = Svd().factorize(weight, known, 6)
    others = (
        Asvd(alpha=0).factorize(weight, known, 6),
        Fwsvd().factorize(weight, flat, 6),
        Gfwsvd(input_shrinkage=1, output_shrinkage=1).factorize(weight, known, 6),
    )
    for other in others:
        torch.testing.assert_close(other.factors.dense(), plain.factors.dense())
        assert other.loss == pytest.approx(plain.loss)


@of_truncations
@of_shapes
def test_every_method_equals_the_published_form_with_its_inverses(method, shape):
    weight, known = layer(shape)
    left, right = (torch.linalg.cholesky(side) for side in metric_of(method, known))
    u, s, v = torch.linalg.svd(left.T @ weight @ right, full_matrices=False)
    truncated = (u[:, :7] * s[:7]) @ v[:7]
    halfway = torch.linalg.solve_triangular(left.T, truncated, upper=True)
    published = torch.linalg.solve_triangular(right, halfway, upper=False, left=False)
    found = method.factorize(weight, known, 7).factors.dense()
    torch.testing.assert_close(found, published, rtol=0, atol=1e-8)


def test_scales_are_the_published_ones_where_a_channel_is_alive():
    _, known = layer((24, 40))
    for alpha in (0.5, 1.0):
        mean = Asvd(alpha=alpha).scale(known)
        torch.testing.assert_close(mean, known.mean_abs**alpha)
        largest = Asvd(alpha=alpha, scaling="abs_max").scale(known)
        torch.testing.assert_close(largest, known.max_abs**alpha)
    torch.testing.assert_close(Fwsvd().scale(known).square(), known.fisher)
    _, dead = hostile("dead channels", (24, 40))
    for method in SCALED:
        scale = method.scale(dead)
        torch.testing.assert_close(scale[::3], (1e-3 * scale.median()).expand(14))


@of_shapes
@pytest.mark.parametrize("kind", ["singular", "one token", "dead channels", "outliers"])
def test_a_singular_gram_costs_no_version_its_optimality_and_the_second_no_damping(shape, kind):
    weight, statistics = hostile(kind, shape)
    gram, rank = statistics.gram, min(shape) // 4
    best = left_of_gram(weight @ gram @ weight.T, rank).loss
    first, second = (
        method.factorize(weight, statistics, rank) for method in (SvdLlm(), SvdLlmV2())
    )
    assert first.loss == first.factors.output_error(weight, gram)  # not the tail, which is damped
    assert first.loss == pytest.approx(best, rel=1e-5, abs=1e-14)
    assert second.damping == 0
    assert second.loss == pytest.approx(best, rel=1e-6, abs=1e-13)
    assert second.factors.output_error(weight, gram) == pytest.approx(best, rel=1e-6, abs=1e-13)
    # The pseudo-inverse of the published form is as good where there is data, and worse elsewhere.
    values, vectors = torch.linalg.eigh(gram)
    seen = vectors[:, values > 1e-14 * values.max()]
    published = LowRankFactors(A=second.factors.A @ seen @ seen.T, B=second.factors.B)
    assert published.output_error(weight, gram) == pytest.approx(best, rel=1e-6, abs=1e-13)
    error, worse = (weight - found.dense() for found in (second.factors, published))
    assert error.norm() <= worse.norm() * (1 + 1e-12)


@of_shapes
def test_the_update_is_least_squares_on_the_shifted_inputs(shape):
    rank = min(shape) // 3
    weight, known = layer(shape)
    before, after = (method.factorize(weight, known, rank) for method in (SvdLlm(), UPDATED))
    gram, A, B = known.shifted_gram, after.factors.A, after.factors.B
    assert torch.equal(A, before.factors.A)
    assert after.loss == after.factors.output_error(weight, gram)
    assert after.loss < before.factors.output_error(weight, gram)
    # Stationary, up to the ridge of 1e-12: the gradient with respect to B against its first term.
    gradient = (weight - B @ A) @ gram @ A.T
    assert gradient.norm() < 1e-10 * (weight @ gram @ A.T).norm()
    # The paper's form: tokens x' with this Gram, y = W x', and z = A x'.
    tokens = torch.linalg.cholesky(gram).T
    published = torch.linalg.lstsq(tokens @ A.T, tokens @ weight.T).solution.T
    torch.testing.assert_close(B, published, rtol=0, atol=1e-8)


@of_shapes
def test_the_update_leaves_what_is_optimal_already_or_has_no_data(shape):
    rank = min(shape) // 3
    weight, known = layer(shape)
    optimal = SvdLlm().factorize(weight, known, rank).factors
    for gram in (known.gram, torch.zeros_like(known.gram)):
        same = LayerStatistics(gram=known.gram, shifted_gram=gram)
        found = UPDATED.factorize(weight, same, rank).factors
        torch.testing.assert_close(found.B, optimal.B, rtol=0, atol=1e-9)


@of_methods
def test_a_method_reads_no_more_than_it_says(method):
    weight, known = layer((30, 20))
    said = {moment: getattr(known, moment) for moment in method.needs}
    full = method.factorize(weight, known, 5).factors.dense()
    assert torch.equal(method.factorize(weight, LayerStatistics(**said), 5).factors.dense(), full)
    assert torch.equal(
        method.spectrum(weight, LayerStatistics(**said)), method.spectrum(weight, known)
    )
    for moment in said:
        with pytest.raises(LookupError, match=f"gathered no {moment}"):
            method.factorize(weight, LayerStatistics(**(said | {moment: None})), 5)


def test_options_out_of_range_or_unknown_are_refused():
    for method, option, value in (
        (Asvd, "alpha", 1.5),
        (Asvd, "scaling", "median"),
        (Gfwsvd, "output_shrinkage", float("nan")),
        (Fwsvd, "alpha", 0.5),
    ):
        with pytest.raises(ValidationError, match=option):
            method(**{option: value})


def hostile(kind, shape):
    """A weight and statistics that a careless factorisation fails on."""
    rows, columns = shape
    weight = normal(rows, columns)
    x, g = correlated(columns, tokens=200), correlated(rows, tokens=200, seed=9)
    match kind:
        case "singular":  # fewer tokens than channels
            x, g = x[: min(shape) // 3], g[: min(shape) // 3]
        case "one token":
            x, g = x[:1], g[:1]
        case "dead channels":
            x[:, ::3], g[:, ::3] = 0, 0
        case "constant feature":
            x[:, 2], g[:, 2] = 3, 3
            x[:, 3], g[:, 3] = -3, -3  # with it, a direction that is never seen
        case "outliers":
            x[:, 1] *= 1000
            x[0] *= 1000
            g[:, 1] *= 1000
            g[0] *= 1000
        case "huge":
            x = x * 1e120
        case "tiny":
            x = x * 1e-120
        case "all dead":
            x, g = x * 0, g * 0
        case "dead inputs":
            x = x * 0
        case "no gradients":
            g = g * 0
        case "huge row":
            weight[1] *= 1e4
        case "bf16 zeros":
            weight[::4], weight[:, ::5] = 0, 0
            weight = weight.bfloat16()
    return weight, statistics_of(x, g)


HOSTILE = (
    *("singular", "one token", "dead channels", "constant feature", "outliers", "huge", "tiny"),
    *("all dead", "dead inputs", "no gradients", "huge row", "bf16 zeros"),
)


@of_methods
@of_shapes
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_inputs_never_give_nan_and_lose_what_is_reported(method, shape, kind):
    weight, statistics = hostile(kind, shape)
    assert torch.isfinite(method.spectrum(weight, statistics)).all()
    for rank in (1, min(shape) // 2, min(shape)):
        found = method.factorize(weight, statistics, rank)
        assert torch.isfinite(found.factors.A).all()
        assert torch.isfinite(found.factors.B).all()
        assert -1e-14 <= found.loss <= 1
        metric = metric_of(method, statistics, found.damping)
        if energy(weight.double(), metric) > 0:
            measured = lost(weight.double(), found.factors, metric)
            assert found.loss == pytest.approx(measured, rel=1e-6, abs=1e-10)


@of_shapes
def test_the_damping_that_a_singular_metric_needs_is_reported(shape):
    weight, statistics = hostile("singular", shape)
    assert UNSHRUNK.factorize(weight, statistics, 4).damping > 0
    assert UPDATED.factorize(weight, statistics, min(shape) // 2).damping > 0
    assert Gfwsvd().factorize(weight, statistics, 4).damping == 0


@of_methods
@of_shapes
def test_without_data_truncation_is_plain_and_a_zero_weight_loses_nothing(method, shape):
    weight, dead = hostile("all dead", shape)
    plain = Svd().factorize(weight, dead, 6).factors.dense()
    torch.testing.assert_close(method.factorize(weight, dead, 6).factors.dense(), plain)
    zero, (_, statistics) = torch.zeros(shape), layer(shape)
    found = method.factorize(zero, statistics, 3)
    assert found.loss == 0
    assert not found.factors.dense().any()
    assert not method.spectrum(zero, statistics).any()


@of_methods
@given(power=st.integers(-30, 30))
def test_the_scale_of_the_data_does_not_change_the_factors(method, power):
    weight, x, g = normal(20, 12), correlated(12), correlated(20, seed=7)
    there = method.factorize(weight, statistics_of(x, g), 5).factors.dense()
    scaled = statistics_of(x * 2.0**power, g * 2.0 ** (power // 2))
    torch.testing.assert_close(
        method.factorize(weight, scaled, 5).factors.dense(), there, rtol=0, atol=1e-8
    )
