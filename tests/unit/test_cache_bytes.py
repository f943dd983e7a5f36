"""What the plot of bytes by layer shows is what the plan counts."""

import pytest

from benchmarks.offline.cache_bytes import draw, side_bytes
from offline_compress.allocation import CachePlan, CalibrationCost, RankPlan
from vllm_svd.format import KVProjection

TIERS = [{"channels": 16, "store": "int8"}, {"channels": 8, "store": "int4"}]
TIERED = {"k_tiers": TIERS, "v_tiers": [*TIERS, {"channels": 16, "store": "int2"}]}
HEADS = {"num_kv_heads": 4, "head_dim": 32}


def cache(**projection) -> CachePlan:
    if not projection:
        return CachePlan(**HEADS)
    return CachePlan(**HEADS, projection=KVProjection.model_validate(HEADS | projection))


CACHES = {
    "dense": cache(),
    "ranks": cache(mode="post", k_rank=24, v_rank=8),
    "tiers": cache(mode="pre", group=2, k_rank=24, v_rank=40, **TIERED),
}


@pytest.mark.parametrize("name", CACHES)
def test_parts_add_up_to_the_bytes_of_the_cache(name):
    sides = [side_bytes(CACHES[name], side, 2) for side in ("key", "value")]
    assert sum(sum(side.values()) for side in sides) == CACHES[name].bytes(2)


def test_tiers_are_codes_and_a_scale_in_every_group_and_slots_are_filled_up():
    values = side_bytes(CACHES["tiers"], "value", 2)
    assert values == {
        "int8": 2 * (16 + 1),
        "int4": 2 * (4 + 1),
        "int2": 2 * (4 + 1),
        "fill": 2 * (-(22 + 27) % 4),
    }


def test_the_plot_is_a_png(tmp_path):
    plan = RankPlan(
        dtype="BF16",
        matrices={},
        caches=CACHES,
        source_bytes=0,
        copied_bytes=0,
        calibration=CalibrationCost.model_construct(),
    )
    draw(plan, tmp_path / "new" / "bytes.png")
    assert (tmp_path / "new" / "bytes.png").read_bytes().startswith(b"\x89PNG")
