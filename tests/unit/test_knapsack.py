"""One offer per matrix within the budget: against every choice there is."""

from fractions import Fraction
from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from offline_compress.allocation import Evidence, Knapsack, Matrix, Offer
from offline_compress.allocation.knapsack import hull

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
    shares = Knapsack().shares(kept, evidence(given_menus, sizes))
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
    hulls = [hull(menu) for menu in given_menus]
    step = max(
        (a.loss - b.loss for offers in hulls for a, b in pairwise(offers)),
        default=0,
    )
    assert loss <= min(within) + len(given_menus) * step + 1e-9


def test_bytes_go_where_they_save_most():
    flat = [Offer(Fraction(1, 4), 1.0), Offer(Fraction(1, 2), 0.9), Offer(Fraction(1), 0.0)]
    steep = [Offer(Fraction(1, 4), 9.0), Offer(Fraction(1, 2), 2.0), Offer(Fraction(1), 0.0)]
    shares = Knapsack().shares(Fraction(3, 8), evidence([flat, steep], [4, 4]))
    assert shares == {"0": Fraction(1, 4), "1": Fraction(1, 2)}


@given(offers)
def test_a_hull_is_convex_and_nothing_lies_below_it(given_offers):
    found = hull(given_offers)
    slopes = [(b.loss - a.loss) / float(b.share - a.share) for a, b in pairwise(found)]
    assert slopes == sorted(slopes)
    assert all(slope < 0 for slope in slopes)
    assert found[0].share == min(given_offers).share
    assert found[-1].loss == min(offer.loss for offer in given_offers)
    for offer in given_offers:
        for a, b in pairwise(found):
            if a.share <= offer.share <= b.share:
                line = a.loss + (b.loss - a.loss) * float(
                    (offer.share - a.share) / (b.share - a.share)
                )
                assert offer.loss >= line - 1e-9
