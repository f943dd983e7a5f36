"""Rank floors, what stays dense, and the sums of a plan."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.allocation import (
    CalibrationCost,
    KVBudget,
    LayerOverride,
    RankPlan,
    plan_caches,
    plan_matrices,
    plan_matrix,
    rank_at,
)

sizes = st.integers(1, 20000)
shares = st.integers(1, 100).map(lambda percent: percent / 100)


@given(rows=sizes, columns=sizes, kept=shares)
def test_the_rank_is_the_largest_within_the_budget(rows, columns, kept):
    rank = rank_at(kept, rows, columns)
    budget = Fraction(str(kept)) * rows * columns
    assert rank * (rows + columns) <= budget < (rank + 1) * (rows + columns)


def test_known_ranks_of_llama_7b():
    assert [rank_at(0.8, *shape) for shape in ((4096, 4096), (11008, 4096))] == [1638, 2388]
    assert [rank_at(0.6, *shape) for shape in ((1024, 4096), (14336, 4096))] == [491, 1911]


def test_kept_is_taken_in_decimals():
    assert rank_at(0.29, 200, 200) == 29


@given(rows=sizes, columns=sizes, kept=shares, multiple=st.sampled_from([1, 8, 64]))
def test_a_planned_rank_is_a_multiple_that_saves_parameters(rows, columns, kept, multiple):
    plan = plan_matrix(rows, columns, kept=kept, rank_multiple=multiple, method="svd")
    if plan.rank is None:
        assert plan.method == "dense"
        assert plan.reason
        assert plan.parameters == rows * columns
    else:
        assert plan.reason is None
        assert plan.rank % multiple == 0
        assert 1 <= plan.rank <= min(rows, columns)
        assert plan.parameters == plan.rank * (rows + columns) < rows * columns
        assert plan.rank == multiple or plan.parameters <= kept * rows * columns


def test_a_matrix_too_small_to_save_says_why():
    plan = plan_matrix(8, 8, kept=0.9, rank_multiple=4, method="svd")
    assert plan.rank is None
    assert plan.reason == "factors of rank 4 hold 64 parameters, the matrix 64"


def test_kept_of_one_leaves_every_matrix_dense():
    plans = plan_matrices({"a": (64, 64), "b": (8, 512)}, kept=1, rank_multiple=1, method="svd")
    assert {(plan.rank, plan.reason) for plan in plans.values()} == {(None, "weights.kept is 1")}


@given(kept=shares, head_dim=st.integers(1, 256), multiple=st.sampled_from([1, 8, 16]))
def test_kv_ranks_are_near_their_share_and_within_the_head(kept, head_dim, multiple):
    k_rank, v_rank = KVBudget(kept=kept, rank_multiple=multiple).ranks(0, head_dim)
    assert k_rank == v_rank
    assert 1 <= k_rank <= head_dim
    assert k_rank == head_dim or k_rank % multiple == 0
    assert k_rank in (multiple, head_dim) or abs(k_rank - kept * head_dim) <= multiple / 2 + 1e-9


def test_keys_values_and_layers_override_the_budget():
    budget = KVBudget(
        kept=0.5,
        v_kept=0.25,
        layers={1: LayerOverride(mode="post", k_rank=9), 2: LayerOverride(k_rank=64, v_rank=64)},
    )
    plans = plan_caches(["a", "b", "c"], 2, 64, budget)
    found = [(p.projection.mode, p.projection.k_rank, p.projection.v_rank) for p in plans.values()]
    assert found == [("pre", 32, 16), ("post", 9, 16), ("pre", 64, 64)]


def test_a_cache_stays_dense_without_a_budget_and_says_why():
    assert plan_caches(["a"], 2, 64, KVBudget(kept=None))["a"].reason == "kv.kept is null"
    assert "saves nothing" in plan_caches(["a"], 2, 64, KVBudget(kept=1))["a"].reason


def test_one_layer_may_be_projected_without_a_budget_for_the_rest():
    budget = KVBudget(kept=None, layers={0: LayerOverride(v_rank=16)})
    first, second = plan_caches(["a", "b"], 2, 64, budget).values()
    assert (first.projection.k_rank, first.projection.v_rank) == (64, 16)
    assert second.projection is None


def test_overrides_the_model_has_no_place_for_are_all_named():
    budget = KVBudget(layers={1: LayerOverride(k_rank=65, v_rank=99), 7: LayerOverride()})
    assert budget.problems(2, 64) == [
        "kv.layers.1.k_rank: 65 exceeds the head size 64",
        "kv.layers.1.v_rank: 99 exceeds the head size 64",
        "kv.layers.7: the model's layers are 0 to 1",
    ]


@pytest.fixture
def plan():
    return RankPlan(
        dtype="BF16",
        matrices=plan_matrices(
            {"q": (64, 64), "gate": (160, 64)}, kept=0.5, rank_multiple=1, method="asvd"
        ),
        caches=plan_caches(["attention"], 2, 32, KVBudget(kept=0.25)),
        source_bytes=60_000,
        copied_bytes=1000,
        calibration=CalibrationCost(
            passes=1, gram_bytes=65_536, workspace_bytes=9, weight_elements=15_000
        ),
    )


def test_totals_are_the_sums_of_the_parts(plan):
    totals = plan.totals
    assert plan.compressed == {"q": 16, "gate": 22}
    assert totals.linear_parameters_dense == 64 * 64 + 160 * 64
    assert totals.linear_parameters == 16 * 128 + 22 * 224
    bases = sum(_size(shape) for shape in plan.projected["attention"].tensors("x").values())
    assert totals.checkpoint_bytes == 2 * (totals.linear_parameters + bases) + 1000
    assert (totals.kv_bytes_per_token_dense, totals.kv_bytes_per_token) == (256, 64)
    assert totals.checkpoint_bytes_dense == 60_000


def test_a_plan_survives_its_file(plan):
    assert RankPlan.parse(json.loads(plan.model_dump_json())) == plan


def _size(shape):
    size = 1
    for extent in shape:
        size *= extent
    return size
