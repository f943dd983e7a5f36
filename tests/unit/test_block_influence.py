"""block_influence: the published formula where it applies, and exactly the budget everywhere."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.allocation.allocator import Evidence, Matrix
from offline_compress.allocation.block_influence import BlockInfluence
from vllm_svd.errors import SvdError


def matrices(widths):
    """A square matrix and a wide one in each layer."""
    found = {}
    for layer, width in enumerate(widths):
        found[f"{layer}.q_proj"] = Matrix(width, width, layer, "q_proj")
        found[f"{layer}.up_proj"] = Matrix(3 * width, width, layer, "up_proj")
    return found


def removed_by(allocator, kept, evidence):
    """phi of each layer, every matrix of which must have the same."""
    shares = allocator.shares(kept, evidence)
    assert shares.keys() == evidence.matrices.keys()
    layers = {}
    for path, matrix in evidence.matrices.items():
        layers.setdefault(matrix.layer, set()).add(1 - shares[path])
    assert all(len(found) == 1 for found in layers.values())
    return [layers[layer].pop() for layer in sorted(layers)]


influences = st.lists(st.floats(-1, 2), min_size=1, max_size=12)


@given(
    influence=influences,
    kept=st.fractions(Fraction(1, 5), 1, max_denominator=1000),
    eps=st.sampled_from([1e-6, 0.01, 0.1, 3.0, 1e6]),
    data=st.data(),
)
def test_the_budget_is_met_exactly_and_no_layer_loses_more_than_the_cap(influence, kept, eps, data):
    widths = data.draw(
        st.lists(st.integers(1, 60), min_size=len(influence), max_size=len(influence))
    )
    evidence = Evidence(matrices(widths), influence=influence)
    removed = removed_by(BlockInfluence(eps=eps), kept, evidence)
    sizes = [4 * width * width for width in widths]
    total = sum(size * phi for size, phi in zip(sizes, removed, strict=True))
    assert total == (1 - kept) * sum(sizes)
    assert all(0 <= phi <= Fraction(4, 5) for phi in removed)
    # Below the cap all are one multiple of exp(-s / eps), and those at the cap would be above it.
    free = [layer for layer, phi in enumerate(removed) if 1e-290 < phi < Fraction(4, 5)]
    for one in free:
        for other, phi in enumerate(removed):
            exponent = (influence[one] - influence[other]) / eps
            ratio = math.exp(min(exponent, 700.0))
            if phi < Fraction(4, 5):
                assert float(phi / removed[one]) == pytest.approx(ratio, rel=1e-9, abs=1e-300)
            else:
                assert float(removed[one]) * ratio >= 0.8 * (1 - 1e-9)


@given(influence=st.lists(st.floats(0, 0.2), min_size=1, max_size=12))
def test_without_a_cap_it_is_the_published_softmax(influence):
    evidence = Evidence(matrices([7] * len(influence)), influence=influence)
    removed = removed_by(BlockInfluence(), Fraction(9, 10), evidence)
    weights = [math.exp(-value / 0.1) for value in influence]
    expected = [len(influence) * 0.1 * weight / sum(weights) for weight in weights]
    assert max(expected) < 0.8
    assert [float(phi) for phi in removed] == pytest.approx(expected, rel=1e-12)


@given(influence=st.lists(st.floats(0, 1), min_size=2, max_size=6), data=st.data())
def test_no_other_split_is_cheaper(influence, data):
    """The minimum of sum_l n_l phi_l (s_l + eps log phi_l) under budget and cap."""
    widths = data.draw(
        st.lists(st.integers(1, 9), min_size=len(influence), max_size=len(influence))
    )
    sizes = [4 * width * width for width in widths]
    evidence = Evidence(matrices(widths), influence=influence)
    removed = [float(p) for p in removed_by(BlockInfluence(), Fraction(2, 5), evidence)]

    def cost(phi):
        return sum(
            n * p * (s + 0.1 * math.log(p)) for n, p, s in zip(sizes, phi, influence, strict=True)
        )

    one, other = data.draw(st.permutations(range(len(sizes))))[:2]
    room = min(removed[one] * sizes[one], (0.8 - removed[other]) * sizes[other])
    step = room * data.draw(st.floats(0, 0.99))
    moved = list(removed)
    moved[one] -= step / sizes[one]
    moved[other] += step / sizes[other]
    assert cost(moved) >= cost(removed) - 1e-12 * sum(sizes)


def test_layers_that_matter_less_lose_more():
    evidence = Evidence(matrices([8] * 4), influence=[0.4, 0.05, 0.1, 0.3])
    removed = removed_by(BlockInfluence(), Fraction(7, 10), evidence)
    assert removed[1] > removed[2] > removed[3] > removed[0] > 0


def test_the_influence_is_taken_as_measured():
    """Layers that are equally important stay alike, however small the differences between them."""
    near = Evidence(matrices([8] * 3), influence=[0.010, 0.011, 0.012])
    removed = removed_by(BlockInfluence(), Fraction(7, 10), near)
    assert max(removed) - min(removed) < Fraction(1, 100)


def test_all_kept_and_all_at_the_cap():
    evidence = Evidence(matrices([8, 5, 3]), influence=[0.3, 0.0, 0.9])
    assert removed_by(BlockInfluence(), Fraction(1), evidence) == [0, 0, 0]
    assert removed_by(BlockInfluence(), Fraction(1, 5), evidence) == [Fraction(4, 5)] * 3


def test_a_budget_below_the_cap_is_refused_with_the_remedy():
    evidence = Evidence(matrices([8]), influence=[0.1])
    with pytest.raises(SvdError, match=r"(?s)max_removed 0\.8.*Remedy: set weights\.kept to 0\.2"):
        BlockInfluence().shares(Fraction(19, 100), evidence)
    assert BlockInfluence(max_removed=0.9).shares(Fraction(19, 100), evidence)


def test_influences_that_are_not_finite_are_named():
    evidence = Evidence(matrices([8, 8]), influence=[0.1, math.nan])
    with pytest.raises(SvdError, match="decoder layers 1 are not finite"):
        BlockInfluence().shares(Fraction(1, 2), evidence)


def test_it_asks_for_the_influence_alone():
    assert BlockInfluence().asks == frozenset({"influence"})
