"""CPU and Triton kernels against the fp64 reference, over random ragged paged batches."""

import pytest
import torch
from every_kernel import KERNELS, ON_CPU, THREE, build, check, half, heads, settings_of, sides
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import DEVICE, Case, Tiers

from vllm_svd.attention.backend import LatentBackend
from vllm_svd.kernels.latent_attention import (
    compiled,
    cpu,
    reference,
    split_triton,
    tiles_triton,
    triton,
)
from vllm_svd.kernels.paged_batch import PagedBatch

RAGGED = [(1, 1), (1, 40), (7, 7), (20, 53), (1, 33), (5, 48)]

TIERS: list[tuple[Tiers, Tiers]] = [
    (((16, "int8"),), ((24, "int8"),)),
    (((40, "fp8_e4m3"),), ((4, "fp8_e4m3"),)),
    (((32, "int4"),), ((72, "int4"),)),
    (((4, "int2"),), ((64, "int2"),)),
    (((8, "int8"), (24, "int4")), ((20, "int8"), (4, "int4"))),
    (THREE, THREE),
    (((8, "fp8_e4m3"), (8, "int2")), ((40, "int4"), (12, "int2"))),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("block", [16, 64])
def test_ragged_batches(kernel, mode, window, block):
    """Pages of less than a tile of Triton's keys, and of whole ones."""
    check(kernel, build([*RAGGED, (2, 150)], mode=mode, window=window, block=block))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape",
    [
        {"group": 1, "kv_heads": 3},
        {"group": 3},
        {"group": 17},
        {"kv_heads": 4, "shared": 2},
        {"kv_heads": 3, "shared": 3, "group": 1, "k_rank": 40},
        {"kv_heads": 6, "shared": 3, "mode": "post"},
        {"k_rank": 5, "v_rank": 40, "d": 48},
        {"d": 64, "k_rank": 32, "v_rank": 64},
        {"d": 80, "k_rank": 80, "v_rank": 16},
        {"d": 96, "k_rank": 48, "v_rank": 16, "rotary_dim": 48},
        {"d": 128, "k_rank": 64, "v_rank": 48},
        {"d": 256, "k_rank": 112, "v_rank": 32},
        {"d": 256, "k_rank": 176, "v_rank": 64, "mode": "post"},
        {"rotary_dim": 16},
        {"neox": False},
        {"neox": False, "rotary_dim": 24},
    ],
    ids=str,
)
def test_shapes_and_rotary_styles(kernel, shape):
    check(kernel, build(RAGGED, **shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_half_precision(kernel, mode):
    check(kernel, build(RAGGED, mode=mode, dtype=half(kernel)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("tiers", TIERS, ids=str)
@pytest.mark.parametrize("halved", [False, True])
def test_tiers(kernel, mode, tiers, halved):
    """In half precision Triton reads most of them as words."""
    dtype = half(kernel) if halved else torch.float32
    check(kernel, build([*RAGGED, (1, 300)], mode=mode, tiers=tiers, dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape",
    [
        {"window": 1},
        {"window": 9, "mode": "post"},
        {"kv_heads": 4, "shared": 2},
        {"kv_heads": 6, "shared": 3, "mode": "post", "group": 1},
        {"rotary_dim": 16, "neox": False},
        {"rotary_dim": 24, "group": 17},
    ],
    ids=str,
)
def test_tiers_in_other_shapes(kernel, shape):
    check(kernel, build(RAGGED, tiers=(THREE, ((12, "int8"), (8, "int4"))), **shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize(("lengths", "magnitude"), [(RAGGED, 1.0), ([(1, 300)], 2.0**-6)])
def test_tiers_in_half_precision(kernel, mode, lengths, magnitude):
    """The smaller magnitude needs scales that are subnormal in fp16."""
    both = (THREE, ((20, "fp8_e4m3"), (4, "int4")))
    check(kernel, build(lengths, mode=mode, tiers=both, magnitude=magnitude, dtype=half(kernel)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"window": 9}, {"tiers": (THREE, THREE)}, {"kv_heads": 4, "shared": 2, "window": 1}],
    ids=str,
)
@pytest.mark.parametrize("cap", [0.25, 4.0])
def test_soft_caps(kernel, mode, shape, cap):
    check(kernel, build(RAGGED, mode=mode, soft_cap=cap, magnitude=8.0, **shape))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_far_above_their_soft_cap_are_the_cap(kernel):
    """Where exp would overflow, and where a score is nothing beside the cap."""
    for magnitude, cap in ((1e6, 1.0), (1e3, 30.0), (1e-6, 1e4)):
        for mode in ("pre", "post"):
            check(kernel, build(RAGGED, mode=mode, soft_cap=cap, magnitude=magnitude))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_soft_caps_in_half_precision(kernel, mode):
    check(kernel, build(RAGGED, mode=mode, soft_cap=2.0, magnitude=8.0, dtype=half(kernel)))


@given(
    lengths=st.lists(
        st.integers(1, 70).flatmap(lambda n: st.tuples(st.integers(1, min(n, 9)), st.just(n))),
        min_size=1,
        max_size=5,
    ),
    mode=st.sampled_from(["pre", "post"]),
    head=heads(),
    block=st.sampled_from([16, 64, 128]),
    group=st.integers(1, 3),
    ranks=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    tiers=st.one_of(st.none(), st.tuples(sides(), sides())),
    shared=st.sampled_from([1, 2]),
    window=st.one_of(st.none(), st.integers(1, 80)),
    cap=st.one_of(st.none(), st.floats(0.1, 50.0)),
    halved=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_batch(
    kernel, lengths, mode, head, block, group, ranks, tiers, shared, window, cap, halved, seed
):
    shape = {"mode": mode, "k_rank": ranks[0], "v_rank": ranks[1], "window": window, **head}
    shape |= {"block": block, "shared": shared, "group": group, "tiers": tiers, "soft_cap": cap}
    shape |= {"dtype": half(kernel) if halved else torch.float32}
    check(kernel, *(build(lengths, **shape, seed=seed + more) for more in range(12)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tiers", [None, (THREE, THREE)], ids=str)
def test_shared_pages_and_any_layout(kernel, tiers):
    """Two requests share their prefix pages, and the cache has heads inside slots (NHD)."""
    case = build([(1, 48), (3, 48)], tiers=tiers)
    case.batch.block_table[1, :2] = case.batch.block_table[0, :2]
    heads_inside = case.cache.transpose(1, 2).contiguous().transpose(1, 2)
    check(kernel, Case(case.query, heads_inside, case.batch, case.settings))


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_rows_are_left_alone(kernel):
    """A padded batch (CUDA graphs): rows beyond num_tokens and empty requests write nothing."""
    case = build([(1, 20), (1, 30)])
    starts = torch.tensor([0, 1, 2, 2], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([20, 30, 0], dtype=torch.int32, device=DEVICE)
    table = torch.cat((case.batch.block_table, case.batch.block_table[:1]))
    query = torch.cat((case.query, case.query[:1]))
    output = torch.full((3, 4, 24), 7.0, device=DEVICE)
    batch = PagedBatch(starts, lens, table, 3, 1)
    kernel.attend(query, case.cache, batch, output, **settings_of(kernel, case))
    exact = torch.empty(2, 4, 24, dtype=torch.float64, device=DEVICE)
    reference.attend(case.query, case.cache, case.batch, exact, **case.settings)
    assert (output[2] == 7.0).all()
    torch.testing.assert_close(output[:2].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "window", "processors"), [("pre", None, 8), ("pre", 50, 1000), ("post", None, 1000)]
)
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("block", [16, 64])
def test_split_contexts(monkeypatch, mode, window, processors, cap, block):
    """Parts of some contexts are empty, or lie before the window."""
    monkeypatch.setattr(split_triton, "LEAST_PART", 32)
    monkeypatch.setattr(split_triton, "processors", lambda _: processors)
    lengths = [(1, 300), (1, 3), (3, 129), (20, 40)]
    asked = []
    splits_of = split_triton.splits_of
    monkeypatch.setattr(
        split_triton, "splits_of", lambda *given: asked.append(splits_of(*given)) or asked[-1]
    )
    shape = {"mode": mode, "window": window, "soft_cap": cap, "block": block}
    check(triton, build(lengths, **shape))
    check(triton, build(lengths, **shape, tiers=(THREE, THREE)))
    assert asked == [2 if processors == 8 else -(-300 // block) * block // 32] * 2
    test_padding_rows_are_left_alone(triton)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tiers", [None, (THREE, THREE)], ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_pages_before_the_window_may_hold_anything(kernel, tiers, block):
    """vLLM frees them while the block table still names them."""
    case = build([(1, 64), (2, 130)], window=20, tiers=tiers, block=block)
    outputs = torch.full((2, *case.shape), torch.nan, dtype=case.query.dtype, device=DEVICE)
    size = case.cache.shape[2]
    for output in outputs:
        kernel.attend(case.query, case.cache, case.batch, output, **settings_of(kernel, case))
        for request, length in enumerate((64, 129)):
            freed = case.batch.block_table[request, : (length - 20) // size]
            case.cache[freed.long()] = 255 if tiers else torch.nan
    assert torch.equal(*outputs)


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_tiles_are_smaller_where_a_gpu_has_less_memory(monkeypatch, mode):
    """What an H100 holds is too much for an L4, and what neither holds takes the least."""
    tiles, tile = [], tiles_triton.tile
    monkeypatch.setattr(
        tiles_triton, "tile", lambda *given: tiles.append(tile(*given)) or tiles[-1]
    )
    case = build([(1, 300), (20, 53)], mode=mode, tiers=(THREE, THREE))
    for shared_memory in (227 << 10, 0):
        monkeypatch.setattr(tiles_triton, "shared_memory", lambda _, size=shared_memory: size)
        check(triton, case)
    assert tiles == [(64, 3), (32, 1)]
    query = torch.empty(1, 32, 128, dtype=torch.bfloat16)
    for size, expected in ((227 << 10, (64, 3)), (99 << 10, (32, 3))):
        monkeypatch.setattr(tiles_triton, "shared_memory", lambda _, size=size: size)
        assert tile(query, 128, 128, 128, 8) == expected


def test_pages_that_vllm_may_choose_hold_whole_tiles():
    preferred = LatentBackend.get_preferred_block_size(16)
    assert all(preferred % keys == 0 for keys, _ in tiles_triton.TILES)
    assert LatentBackend.supports_block_size(preferred)
    assert LatentBackend.get_preferred_block_size(128) == 128


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("window", [None, 1, 9, 50])
@pytest.mark.parametrize(
    "shape", [{}, {"shared": 2}, {"tiers": (THREE, THREE)}, {"soft_cap": 0.5}], ids=str
)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_prompts_in_blocks_of_queries(kernel, monkeypatch, mode, window, shape):
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 8)
    monkeypatch.setattr(compiled, "ROWS", 16)
    case = build([(60, 60), (33, 90), (9, 40), (1, 20)], mode=mode, window=window, **shape)
    check(kernel, case)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_key_that_is_not_finite_reaches_only_those_who_see_it(kernel):
    case = build([(70, 70)], window=20)
    case.cache[case.batch.block_table[0, 2], :, 8, :16] = torch.nan  # the key at position 40
    output = torch.empty(case.shape)
    kernel.attend(case.query, case.cache, case.batch, output, **case.settings)
    assert output[:40].isfinite().all() and output[60:].isfinite().all()
    assert not output[40:60].isfinite().any()


def test_long_contexts_take_many_tiles(monkeypatch):
    """In torch, whose tiles do not change its result."""
    monkeypatch.setattr(cpu, "TILE_BYTES", 1)
    check(cpu, build([(1, 500), (3, 129), (40, 300)]))
    check(cpu, build([(1, 500), (3, 129), (40, 300)], window=50))
    check(cpu, build([(1, 500), (3, 129), (40, 300)], window=50, soft_cap=0.5))
