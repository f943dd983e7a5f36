"""Learned ranks on a loss whose optimum is known: the sum of spectral tails."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_compress.allocation import Evidence, Matrix
from offline_compress.allocation.learned import Learned
from offline_compress.linalg.stable_svd import soft_gate
from vllm_svd.errors import SvdError

SHAPES = [(64, 64), (64, 96), (160, 64), (32, 64), (64, 64), (160, 64), (64, 160), (48, 48)]


def matrices_of(shapes=SHAPES):
    return {
        f"layers.{index}": Matrix(rows, columns, index, "linear")
        for index, (rows, columns) in enumerate(shapes)
    }


def spectra_of(matrices, seed):
    """Geometric spectra of unlike size and decay."""
    g = torch.Generator().manual_seed(seed)
    spectra = {}
    for path, matrix in matrices.items():
        size, rate = torch.rand(2, generator=g, dtype=torch.float64)
        ranks = torch.arange(min(matrix.rows, matrix.columns), dtype=torch.float64)
        spectra[path] = 10 ** (2 * size - 1) * torch.exp(-(0.02 + 0.2 * rate) * ranks)
    return spectra


class Tails:
    """sum_i (1 - g_i)^2 s_i over all matrices, a little different in every window."""

    def __init__(self, spectra, beta, noise=0.0):
        self.spectra, self.beta, self.noise, self.windows = spectra, beta, noise, []

    def __call__(self, positions, window):
        self.windows.append(window)
        g = torch.Generator().manual_seed(window)
        total = torch.zeros((), dtype=torch.float64)
        for path, position in positions.items():
            spectrum = self.spectra[path]
            shaken = spectrum * (1 + self.noise * torch.randn(len(spectrum), generator=g))
            closed = 1 - soft_gate(position, len(spectrum), self.beta)
            total = total + (closed.square() * shaken).sum()
        return total


def lost(spectra, ranks):
    return sum(float(spectra[path][rank:].sum()) for path, rank in ranks.items())


def filled(matrices, spectra, kept):
    """The greedy optimum: ranks in the order of what they add per parameter, within the budget."""
    room = kept * sum(matrix.size for matrix in matrices.values())
    steps = []
    for path, matrix in matrices.items():
        cost = matrix.rows + matrix.columns
        steps += [(float(s) / cost, path, cost) for s in spectra[path][: matrix.largest_rank]]
    ranks = dict.fromkeys(matrices, 0)
    for _, path, cost in sorted(steps, reverse=True):
        if cost <= room:
            ranks[path] += 1
            room -= cost
    return ranks


def ranks_of(matrices, shares):
    return {path: int(share / matrices[path].share_of(1)) for path, share in shares.items()}


def spent(matrices, shares):
    return sum(share * matrices[path].size for path, share in shares.items())


def learn(learner, kept, seed=0, noise=0.0, windows=4):
    matrices = matrices_of()
    spectra = spectra_of(matrices, seed)
    gated = Tails(spectra, learner.beta, noise)
    evidence = Evidence(matrices, gated=gated, windows=windows)
    return matrices, spectra, learner.shares(kept, evidence), gated


def regret(matrices, spectra, kept, shares):
    """What is left of the way from uniform ranks (1) to the optimum (0)."""
    even = lost(spectra, ranks_of(matrices, dict.fromkeys(matrices, kept)))
    best = lost(spectra, filled(matrices, spectra, kept))
    return (lost(spectra, ranks_of(matrices, shares)) - best) / (even - best)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept", [Fraction(1, 3), Fraction(1, 2), Fraction(4, 5)])
def test_it_comes_close_to_water_filling_and_spends_the_budget_exactly(seed, kept):
    """The defaults, on windows that differ by a tenth."""
    matrices, spectra, shares, _ = learn(Learned(), kept, seed, noise=0.1)
    assert regret(matrices, spectra, kept, shares) <= 0.04
    assert spent(matrices, shares) == kept * sum(matrix.size for matrix in matrices.values())


def test_a_penalty_holds_the_budget_too_though_it_learns_less_from_as_many_steps():
    kept = Fraction(1, 2)
    matrices, spectra, shares, _ = learn(Learned(penalty=200), kept)
    exact = learn(Learned(), kept)[2]
    found = regret(matrices, spectra, kept, shares)
    assert regret(matrices, spectra, kept, exact) < found < 0.5
    assert spent(matrices, shares) == kept * sum(matrix.size for matrix in matrices.values())


@settings(max_examples=20)
@given(
    kept=st.fractions(Fraction(1, 50), Fraction(1), max_denominator=1000),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    penalty=st.sampled_from([None, 5.0]),
)
def test_any_budget_is_met_exactly_by_shares_of_whole_ranks(kept, shapes, penalty):
    matrices = matrices_of(shapes)
    gated = Tails(spectra_of(matrices, seed=1), beta=1.0)
    evidence = Evidence(matrices, gated=gated, windows=2)
    shares = Learned(steps=3, penalty=penalty).shares(kept, evidence)
    assert list(shares) == list(matrices)
    assert all(0 < share <= 1 for share in shares.values())
    assert spent(matrices, shares) == kept * sum(matrix.size for matrix in matrices.values())
    if gated.windows:  # there was something to choose, for matrices that a rank makes smaller
        for path, share in shares.items():
            assert share >= matrices[path].share_of(1) or share == kept


def test_windows_come_in_a_seeded_order_each_once_before_any_twice():
    orders, found = [], []
    for seed in (3, 3, 4):
        *_, shares, gated = learn(
            Learned(steps=10, seed=seed), Fraction(1, 2), noise=0.1, windows=5
        )
        orders.append(gated.windows)
        found.append(shares)
    assert sorted(orders[0][:5]) == sorted(orders[0][5:]) == [0, 1, 2, 3, 4]
    assert orders[0] == orders[1] != orders[2]
    assert found[0] == found[1]


def test_steps_are_of_the_learning_rate_and_decay_as_a_cosine():
    """A constant slope: Adam's normalised step is the learning rate itself."""
    matrices, seen, steps, lr = matrices_of([(64, 64), (64, 64)]), [], 8, 0.02

    def slope(positions, _):
        first, second = positions.values()
        seen.append(float(first.detach()))
        return second - first

    evidence = Evidence(matrices, gated=slope, windows=1)
    Learned(steps=steps, lr=lr).shares(Fraction(1, 2), evidence)
    moved = torch.tensor(seen).diff() * float(matrices["layers.0"].share_of(1))
    phase = torch.arange(steps - 1) * torch.pi / steps
    torch.testing.assert_close(moved, lr * (1 + phase.cos()) / 2, rtol=1e-4, atol=1e-6)


def test_progress_counts_steps():
    matrices = matrices_of()
    calls = []
    gated = Tails(spectra_of(matrices, 0), beta=1.0)
    evidence = Evidence(matrices, gated=gated, windows=1, progress=lambda *call: calls.append(call))
    Learned(steps=3).shares(Fraction(1, 2), evidence)
    assert calls == [("learned ranks", step, 3) for step in range(4)]


def test_a_loss_that_does_not_care_leaves_ranks_as_even_as_whole_ranks_can_be():
    matrices = matrices_of()
    kept = Fraction(1, 2)
    nothing = Evidence(matrices, gated=lambda at, _: 0 * sum(at.values()), windows=1)
    for path, share in Learned().shares(kept, nothing).items():
        assert abs(share - kept) <= 2 * matrices[path].share_of(1)


def test_a_budget_below_one_rank_or_above_all_ranks_leaves_nothing_to_learn():
    matrices = matrices_of([(4, 4), (6, 4)])
    for kept in (Fraction(1, 100), Fraction(99, 100), Fraction(1)):
        evidence = Evidence(matrices, gated=None, windows=1)
        assert Learned().shares(kept, evidence) == dict.fromkeys(matrices, kept)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_by_its_window(broken):
    matrices = matrices_of()
    evidence = Evidence(matrices, gated=lambda at, _: broken * sum(at.values()), windows=1)
    with pytest.raises(SvdError, match=r"window 0.*\nRemedy:"):
        Learned().shares(Fraction(1, 2), evidence)
