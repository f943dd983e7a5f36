"""One offer per matrix within the budget: against every choice there is."""

from fractions import Fraction
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from offline_compress.allocation import Evidence, Knapsack, Matrix, Offer

STEPS = [Offer(Fraction(i, 10), float(10 - i)) for i in range(1, 11)]

offers = st.lists(
    st.builds(
        Offer,
        st.integers(1, 20).map(lambda twentieths: Fraction(twentieths, 20)),
        st.floats(0, 100),
    ),
    min_size=1,
    max_size=5,
)
menus = st.lists(offers, min_size=1, max_size=4)


def evidence(given_menus, sizes):
    matrices = {str(i): Matrix(size, 10, 0, "q_proj") for i, size in enumerate(sizes)}
    return Evidence(matrices, menus={str(i): menu for i, menu in enumerate(given_menus)})


def taken(menu, share):
    return min(offer.loss for offer in menu if offer.share == share)


@given(menus, st.data())
def test_within_the_budget_and_at_most_one_step_worse_than_the_best_choice(given_menus, data):
    sizes = [data.draw(st.integers(1, 9)) for _ in given_menus]
    kept = data.draw(st.integers(1, 20).map(lambda twentieths: Fraction(twentieths, 20)))
    shares = Knapsack(floor=0).shares(kept, evidence(given_menus, sizes))
    found = [shares[str(i)] for i in range(len(given_menus))]
    loss = sum(taken(menu, share) for menu, share in zip(given_menus, found, strict=True))
    spent = sum(share * size for share, size in zip(found, sizes, strict=True))
    cheapest = sum(min(menu).share * size for menu, size in zip(given_menus, sizes, strict=True))
    assert spent <= max(kept * sum(sizes), cheapest)
    within = [
        sum(offer.loss for offer in choice)
        for choice in product(*given_menus)
        if sum(o.share * s for o, s in zip(choice, sizes, strict=True)) <= kept * sum(sizes)
    ]
    if not within:
        assert spent == cheapest
        return
    # The greedy order is optimal but for the step that does not fit (Dantzig's bound).
    step = max(
        (
            above.loss - below.loss
            for menu in given_menus
            for above, below in product(menu, repeat=2)
        ),
        default=0,
    )
    assert loss <= min(within) + step + 1e-9


def test_bytes_go_where_they_save_most():
    flat = [Offer(Fraction(1, 4), 1.0), Offer(Fraction(1, 2), 0.9), Offer(Fraction(1), 0.0)]
    steep = [Offer(Fraction(1, 4), 9.0), Offer(Fraction(1, 2), 2.0), Offer(Fraction(1), 0.0)]
    shares = Knapsack(floor=0).shares(Fraction(3, 8), evidence([flat, steep], [4, 4]))
    assert shares == {"0": Fraction(1, 4), "1": Fraction(1, 2)}


def test_no_matrix_is_below_the_floor():
    """The first loses a tenth of what the second does, and would take the cheapest offer."""
    cheap = [Offer(offer.share, offer.loss / 10) for offer in STEPS]
    menus, kept = [cheap, STEPS], Fraction(1, 2)
    assert Knapsack(floor=0).shares(kept, evidence(menus, [1, 1]))["0"] == Fraction(1, 10)
    floored = Knapsack(floor=0.6).shares(kept, evidence(menus, [1, 1]))
    assert floored == {"0": Fraction(3, 10), "1": Fraction(7, 10)}


@given(menus, st.data())
def test_a_floor_never_breaks_the_budget(given_menus, data):
    """Where a matrix has no offer between the floor and the uniform share it takes one below."""
    sizes = [data.draw(st.integers(1, 9)) for _ in given_menus]
    kept = data.draw(st.integers(1, 20).map(lambda twentieths: Fraction(twentieths, 20)))
    floor = data.draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    shares = Knapsack(floor=floor).shares(kept, evidence(given_menus, sizes))
    if all(min(menu).share <= kept for menu in given_menus):
        spent = sum(shares[str(i)] * size for i, size in enumerate(sizes))
        assert spent <= kept * sum(sizes)
