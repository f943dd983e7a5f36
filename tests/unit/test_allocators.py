"""Allocators: exact budgets for any evidence, and the optimum or the formula where there is one."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_compress.allocation.allocator import Evidence, Matrix
from offline_compress.allocation.budget import Budget
from offline_compress.allocation.greedy import fill
from offline_compress.allocation.strs import Strs, increase_at
from offline_compress.allocation.truncation_loss import TruncationLoss, removed_shares
from offline_compress.allocation.water_filling import WaterFilling

NATS = 3.0  # of the dense model

percents = st.integers(1, 99).map(lambda percent: Fraction(percent, 100))
multiples = st.sampled_from([1, 2, 5])
allocators = st.one_of(
    st.builds(
        Strs,
        max_evaluations=st.integers(2, 40),
        grid=st.sets(st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.95]), min_size=1).map(tuple),
    ),
    st.builds(TruncationLoss),
    st.builds(
        WaterFilling,
        floor=st.sampled_from([0.0, 0.3, 1.0]),
        measure=st.booleans(),
        reference=st.sampled_from([None, 0.5]),
    ),
)


@st.composite
def models(draw):
    """Matrices of any shape, and of any energy, even none."""
    matrices, spectra = {}, {}
    for index in range(draw(st.integers(1, 6))):
        rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        matrix = Matrix(rows, columns, index, draw(st.sampled_from(["q_proj", "up_proj"])))
        decay = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
        scale = draw(st.sampled_from([0.0, 1e-310, 1e-9, 2.0, 1e6, 1e150]))
        exponents = torch.arange(min(rows, columns), dtype=torch.float64)
        matrices[f"{index}"], spectra[f"{index}"] = matrix, scale * decay**exponents
    return matrices, spectra


def square(count, side=20, kind="q_proj"):
    return {f"{layer}.{kind}": Matrix(side, side, layer, kind) for layer in range(count)}


def evidence_for(allocator, matrices, spectra=None, loss=None, progress=None):
    """What the allocator asks for, and nothing else."""
    given = {"matrices": matrices}
    if "spectra" in allocator.asks:
        given["spectra"] = spectra
    if "losses" in allocator.asks:
        given["loss"] = loss
    return Evidence(**given, **({"progress": progress} if progress else {}))


def additive(increase):
    """A loss to which each matrix adds increase(path, share) by itself."""
    return lambda shares: NATS + sum(increase(path, float(share)) for path, share in shares.items())


def assert_spent(kept, matrices, multiple, shares):
    """Whole ranks within the budget, and no further step would fit."""
    assert list(shares) == list(matrices)
    assert all(isinstance(share, Fraction) and 0 < share <= 1 for share in shares.values())
    total = sum(matrix.size for matrix in matrices.values())
    rest = kept * total - sum(shares[path] * matrix.size for path, matrix in matrices.items())
    assert rest >= 0
    for path, matrix in matrices.items():
        step = multiple * (matrix.rows + matrix.columns)
        held = shares[path] * matrix.size
        if shares[path] < 1:
            assert held % step == 0
            assert matrix.share_of(held // (matrix.rows + matrix.columns)) == shares[path]
            assert rest < min(step, matrix.size - held)


@given(allocator=allocators, model=models(), kept=percents, data=st.data())
def test_any_budget_is_spent_exactly_in_whole_ranks(allocator, model, kept, data):
    matrices, spectra = model
    losses = data.draw(st.lists(st.floats(), min_size=1, max_size=8))
    calls = []

    def loss(shares):
        calls.append(shares)
        assert all(0 < share < 1 for share in shares.values())
        return losses[len(calls) % len(losses)]

    multiple = data.draw(multiples)
    evidence = replace(evidence_for(allocator, matrices, spectra, loss), rank_multiple=multiple)
    shares = allocator.shares(kept, evidence)
    if Budget(kept, matrices, multiple).feasible:
        assert_spent(kept, matrices, multiple, shares)
    else:
        assert shares == dict.fromkeys(matrices, kept)
    calls.clear()
    assert allocator.shares(kept, evidence) == shares


@pytest.mark.parametrize("energy", [0.0, 1e12])
@pytest.mark.parametrize("allocator", [Strs(), TruncationLoss(), WaterFilling()])
def test_equal_matrices_get_equal_shares(allocator, energy):
    matrices = square(5, side=32)
    spectra = dict.fromkeys(matrices, energy * 0.5 ** torch.arange(32.0))
    evidence = evidence_for(allocator, matrices, spectra, additive(lambda _, share: 1 - share))
    for kept in (Fraction(2, 16), Fraction(9, 16), Fraction(15, 16), Fraction(1)):
        assert allocator.shares(kept, evidence) == dict.fromkeys(matrices, kept)
        between = allocator.shares(kept - Fraction(1, 40), evidence).values()
        assert max(between) - min(between) <= Fraction(1, 16)  # one rank


@pytest.mark.parametrize("allocator", [Strs(), WaterFilling(floor=0, measure=False)])
@given(decays=st.lists(st.floats(0.1, 0.5), min_size=1, max_size=4))
@settings(max_examples=30)
def test_no_matrix_loses_when_more_is_kept(allocator, decays):
    """Of one shape and with falling returns, else a large step may displace small ones."""
    matrices = square(len(decays), side=24)
    decay = dict(zip(matrices, decays, strict=True))
    spectra = {path: value ** torch.arange(24.0) for path, value in decay.items()}
    loss = additive(lambda path, share: decay[path] ** (24 * share))
    evidence = evidence_for(allocator, matrices, spectra, loss)
    found = [allocator.shares(Fraction(percent, 100), evidence) for percent in range(12, 101, 8)]
    for less, more in itertools.pairwise(found):
        assert all(less[path] <= more[path] for path in matrices)


# --- truncation_loss


def test_shares_follow_the_formula_of_v2_within_each_kind():
    generator = torch.Generator().manual_seed(0)
    matrices = square(6, side=128) | square(3, side=128, kind="up_proj")
    spectra = {
        path: 10.0 ** (2 + index) * torch.rand(128, generator=generator).sort(descending=True)[0]
        for index, path in enumerate(matrices)
    }
    kept = Fraction(7, 10)
    shares = TruncationLoss().shares(kept, Evidence(matrices=matrices, spectra=spectra))
    for kind in ("q_proj", "up_proj"):
        group = [path for path in matrices if path.endswith(kind)]
        rank = int(kept * 64)
        scores = [1 / math.log(math.sqrt(spectra[path][rank:].double().sum())) for path in group]
        for path, score in zip(group, scores, strict=True):
            expected = 1 - len(group) * 0.3 * score / sum(scores)
            assert abs(shares[path] - expected) <= 1 / 64  # one rank


@given(
    removed=percents,
    group=st.lists(
        st.tuples(st.integers(1, 10**8), st.floats(1.001, 1e200)), min_size=1, max_size=8
    ),
)
def test_what_a_group_removes_is_exact_capped_and_least_where_the_loss_is_largest(removed, group):
    sizes, losses = (dict(enumerate(column)) for column in zip(*group, strict=True))
    found = removed_shares(removed, sizes, losses)
    assert sum(found[i] * sizes[i] for i in sizes) == removed * sum(sizes.values())
    ceiling = max(Fraction(95, 100), removed)
    assert all(0 < share <= ceiling for share in found.values())
    for one, other in itertools.permutations(losses, 2):
        if losses[one] >= losses[other]:
            assert found[one] <= found[other]
        if max(found[one], found[other]) < Fraction(95, 100):
            logs = [max(1, math.log(losses[path])) for path in (one, other)]
            assert math.isclose(found[one] * logs[0], found[other] * logs[1], rel_tol=1e-12)


@pytest.mark.parametrize("harmless", [0.0, 0.5, 1.0])
def test_a_group_with_a_loss_of_at_most_one_is_split_uniformly(harmless):
    found = removed_shares(Fraction(1, 5), {"a": 9, "b": 4}, {"a": 1e6, "b": harmless})
    assert found == {"a": Fraction(1, 5), "b": Fraction(1, 5)}


def test_a_loss_below_e_counts_as_e():
    matrices = square(2, side=128)
    lost = dict(zip(matrices, (1.5, math.e), strict=True))  # by the last 96 ranks
    spectra = {path: torch.full((128,), loss**2 / 96) for path, loss in lost.items()}
    shares = TruncationLoss().shares(Fraction(1, 2), Evidence(matrices=matrices, spectra=spectra))
    assert set(shares.values()) == {Fraction(1, 2)}


# --- strs

sensitivities = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4)


@given(sensitivities=sensitivities, kept=st.integers(12, 99).map(lambda n: Fraction(n, 100)))
def test_strs_makes_the_worst_single_increase_as_small_as_the_grid_allows(sensitivities, kept):
    """Against every choice of shares of the grid, or dense, within the budget."""
    matrices = square(len(sensitivities))
    scale = dict(zip(matrices, sensitivities, strict=True))
    grid = (0.1, 0.3, 0.5, 0.8)

    def increase(path, share):
        return scale[path] * (1 - share) ** 2

    shares = Strs(grid=grid).shares(kept, Evidence(matrices=matrices, loss=additive(increase)))
    best = min(
        max(map(increase, matrices, choice))
        for choice in itertools.product((*grid, 1.0), repeat=len(matrices))
        if sum(choice) <= float(kept) * len(matrices) + 1e-9
    )
    assert max(increase(path, float(share)) for path, share in shares.items()) <= best
    ordered = sorted(matrices, key=scale.__getitem__)
    assert all(shares[a] <= shares[b] + Fraction(1, 10) for a, b in itertools.pairwise(ordered))


@pytest.mark.parametrize("most", [2, 3, 7, 8, 25, 60, 109, 500])
def test_strs_obeys_its_cap_leaves_nothing_out_and_says_how_far_it_is(most):
    pairs = itertools.zip_longest(square(8).items(), square(4, kind="up_proj").items())
    matrices = dict(pair for pair in itertools.chain(*pairs) if pair)
    calls, progress = [], []

    def loss(shares):
        calls.append(shares)
        return NATS + sum(float(1 - share) for share in shares.values())

    evidence = Evidence(
        matrices=matrices, loss=loss, progress=lambda *given: progress.append(given)
    )
    shares = Strs(max_evaluations=most).shares(Fraction(1, 2), evidence)
    assert_spent(Fraction(1, 2), matrices, 1, shares)
    assert len(calls) <= min(most, 1 + 9 * 12)
    assert len(calls) == 109 or most < 109
    assert set().union(*calls) == set(matrices)
    assert progress == [("STRS", done, len(calls)) for done in range(len(calls) + 1)]
    if most >= 8:  # two neighbours of a kind at most share a measurement
        assert all(len({path.split(".")[1] for path in call}) <= 1 for call in calls)


def test_a_thinner_grid_finds_the_same_where_losses_fall_exponentially():
    matrices = square(6)
    scale = dict(zip(matrices, [9.0, 4.0, 2.5, 0.6, 0.2, 0.01], strict=True))
    loss = additive(lambda path, share: scale[path] * math.exp(-(3 + scale[path]) * share))
    evidence = Evidence(matrices=matrices, loss=loss)
    full, thin = (Strs(max_evaluations=most) for most in (500, 1 + 3 * 6))
    assert full.shares(Fraction(86, 100), evidence) == thin.shares(Fraction(86, 100), evidence)


def test_matrices_measured_together_divide_their_increase():
    matrices = square(4)  # the second pair is harmless
    loss = additive(lambda path, share: (1 - share) * (path < "2"))
    shares = Strs(max_evaluations=3).shares(Fraction(1, 2), Evidence(matrices=matrices, loss=loss))
    assert list(shares.values()) == [Fraction(9, 10)] * 2 + [Fraction(1, 10)] * 2


@given(
    share=percents,
    known=st.dictionaries(percents, st.floats(-1, math.inf), min_size=2, max_size=5),
)
def test_a_missing_increase_lies_between_its_neighbours(share, known):
    smaller = [known[end] for end in sorted(known) if end <= share][-1:]
    larger = [known[end] for end in sorted(known) if end >= share][:1]
    ends = (*smaller, *larger, *([] if larger else [0.0]))
    if smaller:
        slack = 1e-12 * max(map(abs, ends)) if max(ends) < math.inf else 0
        assert min(ends) - slack <= increase_at(share, known) <= max(ends) + slack


# --- water_filling

curves = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=0, max_size=4),
    min_size=1,
    max_size=4,
)


def falling(steps):
    """A curve of growing sizes and falling losses, of any curvature."""
    sizes = itertools.accumulate((size for size, _ in steps), initial=1)
    losses = list(itertools.accumulate((loss for _, loss in reversed(steps)), initial=0))
    return list(zip(sizes, map(float, reversed(losses)), strict=True))


def total(choice):
    return tuple(map(sum, zip(*choice, strict=True)))


@given(
    curves=curves.map(lambda drawn: [falling(steps) for steps in drawn]),
    rest=st.integers(0, 60),
    price=st.integers(1, 60).map(lambda tenths: tenths / 10),
)
def test_water_filling_is_optimal_at_every_price_and_near_it_between(curves, rest, price):
    """Brute force over all choices; at the budget of a price of bytes (Everett) it is exact."""

    def loss_at(budget):
        named = {str(index): curve for index, curve in enumerate(curves)}
        held = fill(named, budget)
        assert sum(held.values()) <= budget
        return sum(dict(curve)[held[path]] for path, curve in named.items())

    priced = total(
        min(curve, key=lambda point: (point[1] + price * point[0], point[0])) for curve in curves
    )
    assert loss_at(priced[0]) == priced[1]
    budget = sum(curve[0][0] for curve in curves) + rest
    best = min(loss for size, loss in map(total, itertools.product(*curves)) if size <= budget)
    assert best <= loss_at(budget)
    if priced[0] <= budget:
        assert loss_at(budget) <= priced[1]


@pytest.mark.parametrize("reference", [None, 0.3])
def test_water_filling_minimises_the_real_loss_where_it_follows_the_tails(reference):
    matrices = square(3, side=16)
    decays = dict(zip(matrices, [0.4, 0.6, 0.5], strict=True))
    nats = dict(zip(matrices, [0.02, 1.0, 40.0], strict=True))
    spectra = {path: decay ** torch.arange(16.0).double() for path, decay in decays.items()}

    def increase(path, share):
        rank = int(share * 8)
        return nats[path] * float(spectra[path][rank:].sum()) if share < 1 else 0.0

    allocator = WaterFilling(floor=0, reference=reference)
    evidence = Evidence(matrices=matrices, spectra=spectra, loss=additive(increase))
    for eighths in range(3, 25):
        shares = allocator.shares(Fraction(eighths, 24), evidence)
        best = min(
            sum(increase(path, rank / 8) for path, rank in zip(matrices, ranks, strict=True))
            for ranks in itertools.product(range(1, 9), repeat=3)
            if sum(ranks) <= eighths
        )
        found = sum(increase(path, float(share)) for path, share in shares.items())
        assert math.isclose(found, best, rel_tol=1e-9, abs_tol=1e-12)


def test_a_flat_spectrum_is_worth_keeping_dense_or_hardly_at_all():
    matrices = square(2, side=16)
    evidence = Evidence(matrices=matrices, spectra=dict.fromkeys(matrices, torch.ones(16)))
    shares = WaterFilling(measure=False).shares(Fraction(65, 100), evidence)
    assert list(shares.values()) == [1, Fraction(2, 8)]  # loses 14/16, uniform 2 * 11/16


def test_what_is_harmless_keeps_its_floor_and_no_more():
    matrices = square(4, side=40)
    spectra = {path: 0.9 ** torch.arange(40.0) for path in matrices}
    loss = additive(lambda path, share: (1 - share) * (1e-6 if path[0] == "0" else 1.0))
    evidence = Evidence(matrices=matrices, spectra=spectra, loss=loss)
    for floor in (0.0, 0.3, 0.7, 1.0):
        shares = WaterFilling(floor=floor).shares(Fraction(1, 2), evidence)
        expected = max(1, int(Fraction(str(floor)) * 10))
        assert shares["0.q_proj"] == Fraction(expected, 20)
        assert all(share >= Fraction(expected, 20) for share in shares.values())


def test_floors_that_do_not_fit_shrink():
    """No rank is below one, which for the small matrix is far more than its floor."""
    matrices = {"small": Matrix(4, 4, 0, "k_proj"), "large": Matrix(64, 64, 0, "q_proj")}
    spectra = {path: torch.ones(matrix.rows) for path, matrix in matrices.items()}
    evidence = Evidence(matrices=matrices, spectra=spectra)
    kept = Fraction(129, 16 + 64 * 64) + Fraction(8, 16 + 64 * 64)
    shares = WaterFilling(floor=1, measure=False).shares(kept, evidence)
    assert shares == {"small": Fraction(1, 2), "large": Fraction(1, 32)}


def test_noise_counts_as_the_least_increase_and_overflow_as_the_largest():
    matrices = square(4, side=40)
    spectra = {path: 0.9 ** torch.arange(40.0) for path in matrices}
    allocator = WaterFilling(floor=0)

    def shares(*increases):
        given = dict(zip(matrices, increases, strict=True))
        loss = additive(lambda path, _: given[path])
        return allocator.shares(
            Fraction(1, 2), Evidence(matrices=matrices, spectra=spectra, loss=loss)
        )

    assert shares(-0.25, 0.5, math.nan, 2.0) == shares(0.5, 0.5, 2.0, 2.0)
    assert shares(0.0, 0.5, math.inf, 2.0) == shares(0.5, 0.5, 2.0, 2.0)
    assert shares(0.0, -1.0, math.nan, math.inf) == shares(7.0, 7.0, 7.0, 7.0)


def test_what_loses_nothing_measurable_is_not_measured():
    matrices = square(3)
    spectra = {path: torch.zeros(20) for path in matrices}
    spectra["1.q_proj"] = 0.9 ** torch.arange(20.0)
    calls = []

    def loss(shares):
        calls.append(set(shares))
        return NATS + len(shares)

    evidence = Evidence(matrices=matrices, spectra=spectra, loss=loss)
    WaterFilling().shares(Fraction(1, 2), evidence)
    assert calls == [set(), {"1.q_proj"}]
