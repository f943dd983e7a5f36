"""Identities and orderings of the weight methods."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.calibration import LayerStatistics
from offline_compress.linalg import left_of_gram
from offline_compress.methods import Asvd, LowRankFactors, Svd, SvdLlm, workspace_bytes
from offline_compress.methods.svd_llm import input_form, output_form

METHODS = (Svd(), Asvd(), SvdLlm())
SHAPES = ((24, 40), (32, 32), (48, 20))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics_of(x):
    """Of inputs [tokens, n]."""
    return LayerStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def correlated(width, tokens=400, seed=1):
    """Inputs with a decaying, rotated spectrum and channels of unequal scale."""
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -1.0
    rotation, _ = torch.linalg.qr(normal(width, width, seed=seed))
    channels = torch.exp(normal(width, seed=seed + 1))
    return normal(tokens, width, seed=seed + 2) * spectrum @ rotation * channels


def metric_of(method, statistics):
    """The metric M [n, n] that the method minimises tr(E M E^T) in."""
    match method:
        case Svd():
            return torch.eye(len(statistics.gram), dtype=torch.float64)
        case Asvd():
            return torch.diag(method.scale(statistics.mean_abs).square())
        case SvdLlm():
            return statistics.gram


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_reproduces_the_weight(method, shape):
    weight, statistics = normal(*shape), statistics_of(correlated(shape[1]))
    found = method.factorize(weight, statistics, min(shape))
    torch.testing.assert_close(found.factors.dense(), weight, rtol=0, atol=1e-9)
    assert found.loss == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@given(rows=st.integers(2, 30), columns=st.integers(2, 30), seed=st.integers(0, 99), data=st.data())
def test_the_dropped_tail_is_the_loss_measured(method, rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = normal(rows, columns, seed=seed)
    statistics = statistics_of(correlated(columns, seed=seed))
    found = method.factorize(weight, statistics, rank)
    measured = found.factors.output_error(weight, metric_of(method, statistics))
    assert found.damping == 0
    assert found.loss == pytest.approx(measured, rel=1e-6, abs=1e-12)
    assert (found.factors.B.shape, found.factors.A.shape) == ((rows, rank), (rank, columns))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_knows_more_of_the_data_loses_less_of_the_output(shape):
    rank = min(shape) // 3
    errors = {method.name: [] for method in METHODS}
    for seed in range(8):
        weight, statistics = (
            normal(*shape, seed=seed),
            statistics_of(correlated(shape[1], seed=seed)),
        )
        for method in METHODS:
            factors = method.factorize(weight, statistics, rank).factors
            errors[method.name].append(factors.output_error(weight, statistics.gram))
    rows = zip(errors["svd_llm"], errors["asvd"], errors["svd"], strict=True)
    assert all(whitened <= scaled <= plain for whitened, scaled, plain in rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_factors_of_the_rank_beat_svd_llm(shape):
    rank = min(shape) // 3
    weight, statistics = normal(*shape), statistics_of(correlated(shape[1]))
    best = SvdLlm().factorize(weight, statistics, rank)
    for seed in range(50):
        basis, _ = torch.linalg.qr(normal(shape[0], rank, seed=seed))
        nudged, _ = torch.linalg.qr(best.factors.B + 0.01 * basis)
        for other in (basis, nudged):
            candidate = LowRankFactors(A=other.T @ weight, B=other)
            assert candidate.output_error(weight, statistics.gram) > best.loss
        moved = LowRankFactors(
            A=best.factors.A + 1e-3 * normal(rank, shape[1], seed=seed), B=best.factors.B
        )
        assert moved.output_error(weight, statistics.gram) > best.loss


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
def test_both_forms_of_svd_llm_agree(rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, gram = normal(rows, columns, seed=seed), statistics_of(correlated(columns)).gram
    outer, inner = output_form(weight, gram, rank), input_form(weight, gram, rank)
    assert inner.loss == pytest.approx(outer.loss, rel=1e-6, abs=1e-12)
    torch.testing.assert_close(
        inner.factors.dense() @ gram, outer.factors.dense() @ gram, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["singular", "dead channels", "outliers", "one token"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_llm_reports_the_loss_under_the_gram_without_damping(shape, kind):
    """Where the Gram is singular the tall form damps, and the tail it drops is another."""
    weight, statistics = normal(*shape), statistics_of(hostile(kind, shape[1]))
    rank = min(shape) // 4
    found = SvdLlm().factorize(weight, statistics, rank)
    assert found.loss == found.factors.output_error(weight, statistics.gram)
    tail = left_of_gram(weight @ statistics.gram @ weight.T, rank).loss
    assert found.loss == pytest.approx(tail, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize(
    ("method", "needs"), [(Svd(), "nothing"), (Asvd(), "mean_abs"), (SvdLlm(), "gram")]
)
def test_a_method_reads_no_more_than_it_says(method, needs):
    statistics = statistics_of(correlated(20))
    given = {
        "nothing": LayerStatistics(),
        "mean_abs": LayerStatistics(mean_abs=statistics.mean_abs),
        "gram": LayerStatistics(statistics.gram),
    }
    assert method.needs == needs
    weight = normal(30, 20)
    full = method.factorize(weight, statistics, 5).factors.dense()
    assert torch.equal(method.factorize(weight, given[needs], 5).factors.dense(), full)
    if needs != "nothing":
        with pytest.raises(LookupError, match=f"gathered no {needs}"):
            method.factorize(weight, LayerStatistics(), 5)


@pytest.mark.parametrize("shape", [(1000, 2000), (2000, 1000), (1400, 1400)], ids=str)
def test_the_planned_workspace_is_the_peak_of_a_factorisation(shape):
    script = """
import ctypes, sys, torch
from offline_compress.calibration import LayerStatistics
from offline_compress.methods import SvdLlm

def status(field):
    rows = open("/proc/self/status").read().splitlines()
    return int(next(row for row in rows if row.startswith(field)).split()[1]) * 1024

def of(m, n):
    x = torch.randn(n, n, dtype=torch.float64)
    return torch.randn(m, n), LayerStatistics(x.T @ x)

torch.set_num_threads(1)
for small in ((200, 300), (300, 200)):  # libraries allocate at their first call
    SvdLlm().factorize(*of(*small), 50)
weight, statistics = of(*map(int, sys.argv[1:]))
ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is used again would not be counted
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = status("VmRSS")
SvdLlm().factorize(weight, statistics, min(weight.shape) // 2)
print(status("VmHWM") - before)
"""
    command = [sys.executable, "-c", script, *map(str, shape)]
    # Whatever else the process touches only adds to the peak: the least of three is the method's,
    # and LAPACK's small buffers, rounded up to pages, come on top of the matrices that are counted.
    peak = min(int(subprocess.check_output(command, text=True)) for _ in range(3))
    assert 0.6 < peak / workspace_bytes(*shape) < 1.05


def test_both_forms_equal_the_published_one_with_its_inverse():
    weight, gram = normal(30, 18), statistics_of(correlated(18)).gram
    factor = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ factor, full_matrices=False)
    truncated = (u[:, :7] * s[:7]) @ v[:7]
    published = torch.linalg.solve_triangular(factor, truncated, upper=False, left=False)
    for form in (output_form, input_form):
        torch.testing.assert_close(
            form(weight, gram, 7).factors.dense(), published, rtol=0, atol=1e-8
        )


def hostile(kind, width):
    x = correlated(width, tokens=200)
    match kind:
        case "singular":
            return x[: width // 3]
        case "one token":
            return x[:1]
        case "dead channels":
            x[:, ::3] = 0
        case "outliers":
            x[:, 1] *= 1000
            x[0] *= 1000
        case "huge":
            return x * 1e120
        case "tiny":
            return x * 1e-120
        case "all dead":
            return x * 0
    return x


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["singular", "one token", "dead channels", "outliers", "huge", "tiny", "all dead"]
)
def test_hostile_inputs_never_give_nan_and_lose_what_was_predicted(method, shape, kind):
    weight, statistics = normal(*shape), statistics_of(hostile(kind, shape[1]))
    for rank in (1, min(shape) // 2, min(shape)):
        found = method.factorize(weight, statistics, rank)
        assert torch.isfinite(found.factors.A).all()
        assert torch.isfinite(found.factors.B).all()
        if kind != "all dead":
            measured = found.factors.output_error(weight, metric_of(method, statistics))
            assert found.loss == pytest.approx(
                measured, rel=1e-5, abs=2e-5 * (found.damping > 0) + 1e-10
            )


def test_a_singular_gram_costs_no_optimality_in_either_form():
    for shape in SHAPES:
        weight, gram = normal(*shape), statistics_of(hostile("singular", shape[1])).gram
        best = left_of_gram(weight @ gram @ weight.T, 4).loss
        found = SvdLlm().factorize(weight, LayerStatistics(gram, gram.diagonal(), 1), 4)
        assert found.factors.output_error(weight, gram) == pytest.approx(best, rel=1e-5)


def test_all_dead_inputs_fall_back_on_plain_truncation():
    weight, statistics = normal(24, 40), statistics_of(hostile("all dead", 40))
    plain = Svd().factorize(weight, statistics, 6).factors.dense()
    for method in (Asvd(), SvdLlm()):
        torch.testing.assert_close(method.factorize(weight, statistics, 6).factors.dense(), plain)


def test_a_zero_weight_loses_nothing():
    statistics = statistics_of(correlated(12))
    for method in METHODS:
        found = method.factorize(torch.zeros(16, 12), statistics, 3)
        assert found.loss == 0
        assert not found.factors.dense().any()


def test_asvd_at_alpha_zero_is_plain_svd():
    weight, statistics = normal(30, 20), statistics_of(correlated(20))
    plain = Svd().factorize(weight, statistics, 5)
    scaled = Asvd(alpha=0).factorize(weight, statistics, 5)
    torch.testing.assert_close(scaled.factors.dense(), plain.factors.dense())


@given(power=st.integers(-30, 30))
def test_the_scale_of_the_data_does_not_change_the_factors(power):
    weight, x = normal(20, 12), correlated(12)
    for method in METHODS:
        there = method.factorize(weight, statistics_of(x), 5).factors.dense()
        here = method.factorize(weight, statistics_of(x * 2.0**power), 5).factors.dense()
        torch.testing.assert_close(here, there, rtol=0, atol=1e-8)
