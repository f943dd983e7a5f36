"""Rank floors, what stays dense, and the sums of a plan."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.allocation import (
    CalibrationCost,
    KVBudget,
    LayerOverride,
    MatrixPlan,
    RankPlan,
    plan_caches,
)
from offline_compress.methods import Layer, Svd, low_rank_at, rank_at
from offline_compress.planning import kept_of
from offline_compress.recipe import CompressionRecipe
from vllm_svd.format import Codebook, LowRank, LowRankInt8

sizes = st.integers(1, 20000)
shares = st.integers(1, 100).map(lambda percent: percent / 100)
fractions = st.integers(1, 99).map(lambda percent: Fraction(percent, 100))


@given(rows=sizes, columns=sizes, share=fractions)
def test_the_rank_is_the_largest_within_the_budget(rows, columns, share):
    rank = rank_at(share, rows, columns)
    assert rank * (rows + columns) <= share * rows * columns < (rank + 1) * (rows + columns)


def test_known_ranks_of_llama_7b():
    most, less = Fraction("0.8"), Fraction("0.6")
    assert [rank_at(most, *shape) for shape in ((4096, 4096), (11008, 4096))] == [1638, 2388]
    assert [rank_at(less, *shape) for shape in ((1024, 4096), (14336, 4096))] == [491, 1911]


def test_kept_is_taken_in_decimals():
    recipe = CompressionRecipe.model_validate({"weights": {"kept": 0.29}})
    assert rank_at(kept_of(recipe), 200, 200) == 29


@given(rows=sizes, columns=sizes, share=fractions, multiple=st.sampled_from([1, 8, 64]))
def test_a_planned_rank_is_a_multiple_that_saves_parameters(rows, columns, share, multiple):
    found = low_rank_at(rows, columns, share, multiple)
    if isinstance(found, str):
        smallest = max(multiple, rank_at(share, rows, columns) // multiple * multiple)
        assert smallest * (rows + columns) >= rows * columns
        assert found.startswith(f"factors of rank {smallest} hold ")
    else:
        assert found.rank % multiple == 0
        assert 1 <= found.rank <= min(rows, columns)
        assert found.bytes(1) == found.rank * (rows + columns) < rows * columns
        assert found.rank == multiple or found.bytes(1) <= share * rows * columns


def test_a_matrix_too_small_to_save_says_why():
    reason = "factors of rank 4 hold 64 parameters, the matrix 64"
    assert low_rank_at(8, 8, Fraction("0.9"), 4) == reason


def test_every_matrix_of_a_layer_has_its_own_share():
    layer = Layer("layer", {"a": (64, 64), "b": (8, 512), "c": (8, 8)}, 1, 1, 8, item_bytes=2)
    given_shares = {"a": Fraction(1, 2), "b": Fraction(1), "c": Fraction(1, 100)}
    assert Svd().modules_at(layer, given_shares) == {
        "a": LowRank(out_features=64, in_features=64, rank=16),
        "b": "its share is all of it",
        "c": LowRank(out_features=8, in_features=8, rank=1),
    }


@given(kept=shares, head_dim=st.integers(1, 256), multiple=st.sampled_from([1, 8, 16]))
def test_kv_ranks_are_near_their_share_and_within_the_head(kept, head_dim, multiple):
    k_rank, v_rank = KVBudget(kept=kept, rank_multiple=multiple).ranks(0, head_dim, 2)
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
    plans = plan_caches(["a", "b", "c"], 2, 64, budget, 2)
    found = [(p.projection.mode, p.projection.k_rank, p.projection.v_rank) for p in plans.values()]
    assert found == [("pre", 32, 16), ("post", 9, 16), ("pre", 64, 64)]


def test_a_cache_stays_dense_without_a_budget_and_says_why():
    assert plan_caches(["a"], 2, 64, KVBudget(kept=None), 2)["a"].reason == "kv.kept is null"
    assert "saves nothing" in plan_caches(["a"], 2, 64, KVBudget(kept=1), 2)["a"].reason


def test_one_layer_may_be_projected_without_a_budget_for_the_rest():
    budget = KVBudget(kept=None, layers={0: LayerOverride(v_rank=16)})
    first, second = plan_caches(["a", "b"], 2, 64, budget, 2).values()
    assert (first.projection.k_rank, first.projection.v_rank) == (64, 16)
    assert second.projection is None


def test_heads_of_a_group_share_the_ranks_of_their_channels():
    budget = KVBudget(kept=0.25, group=2, rank_multiple=16, layers={1: LayerOverride(k_rank=100)})
    first, second = plan_caches(["a", "b"], 4, 64, budget, 2).values()
    assert (first.projection.k_rank, first.projection.v_rank) == (32, 32)
    assert first.bytes(2) == first.dense_bytes(2) / 4 == 2 * 64 * 2
    stored = first.projection.tensors("a").values()
    assert first.basis_parameters == sum(math.prod(basis.shape) for basis in stored)
    assert (second.projection.k_rank, second.projection.v_rank) == (100, 32)
    assert budget.problems(2, 4, 64) == []
    assert budget.problems(1, 3, 64)[0] == "kv.group: 2 does not divide the model's 3 KV heads"
    whole = plan_caches(["a"], 4, 64, KVBudget(kept=1, group=2), 2)["a"]
    assert "saves nothing" in whole.reason


def test_overrides_the_model_has_no_place_for_are_all_named():
    budget = KVBudget(layers={1: LayerOverride(k_rank=65, v_rank=99), 7: LayerOverride()})
    assert budget.problems(2, 2, 64) == [
        "kv.layers.1.k_rank: 65 exceeds the head size 64",
        "kv.layers.1.v_rank: 99 exceeds the head size 64",
        "kv.layers.7: the model's layers are 0 to 1",
    ]


MODULES = {
    "q": LowRank(out_features=64, in_features=64, rank=16),
    "gate": LowRankInt8(out_features=160, in_features=64, rank=22, correction=True),
    "up": Codebook(
        out_features=160, in_features=64, dim=2, index_bits=4, group_rows=32, group_columns=64
    ),
}


@pytest.fixture
def plan():
    matrices = {
        path: MatrixPlan(
            out_features=module.out_features,
            in_features=module.in_features,
            module=module,
            method="some",
        )
        for path, module in MODULES.items()
    }
    down = MatrixPlan(out_features=64, in_features=160, reason="its share is all of it")
    return RankPlan(
        dtype="BF16",
        matrices=matrices | {"down": down},
        caches=plan_caches(["attention"], 2, 32, KVBudget(kept=0.25), 2),
        source_bytes=60_000,
        copied_bytes=1000 + 2 * 64 * 160,
        calibration=CalibrationCost(
            block_bytes=1,
            gram_bytes=2,
            workspace_bytes=3,
            hidden_bytes=4,
            work_bytes=5,
            forward_operations=6,
            factor_operations=7,
        ),
    )


def test_totals_are_the_sums_of_the_parts(plan):
    totals = plan.totals
    assert plan.compressed == MODULES
    assert [matrix.rank for matrix in plan.matrices.values()] == [16, 22, None, None]
    assert totals.linear_bytes_dense == 2 * (64 * 64 + 3 * 160 * 64)
    made = {
        "q": 2 * 16 * 128,
        "gate": 22 * 224 + 2 * 4 * 22 + 2 * 160,  # int8, two scales a rank, a correction
        "up": 160 * 4 * (32 * 4 // 32) + 5 * 1 * (16 * 2 + 4),  # indices, codebooks and scales
    }
    assert {path: module.bytes(2) for path, module in MODULES.items()} == made
    assert totals.linear_bytes == sum(made.values()) + 2 * 64 * 160
    assert totals.linear_kept == totals.linear_bytes / totals.linear_bytes_dense
    bases = sum(stored.bytes(2) for stored in plan.projected["attention"].tensors("x").values())
    assert totals.checkpoint_bytes == sum(made.values()) + bases + plan.copied_bytes
    assert (totals.kv_bytes_per_token_dense, totals.kv_bytes_per_token) == (256, 64)
    assert totals.checkpoint_bytes_dense == 60_000


def test_a_plan_survives_its_file(plan):
    assert RankPlan.parse(json.loads(plan.model_dump_json())) == plan
