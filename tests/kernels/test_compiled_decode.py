"""The compiled attention against the fp64 reference, over random ragged paged batches."""

import gc
import os
import random
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled_cases import ALL, FP8, INT4, INT8_4_2, UNUSED, WHOLE, build, check, run
from paged_cases import Case

from vllm_svd.kernels import latent_attention, native
from vllm_svd.kernels.latent_attention import compiled, team
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch

pytestmark = [
    pytest.mark.skipif(not native.is_there(), reason="needs numba"),
    pytest.mark.usefixtures("a_team"),
]


@pytest.mark.parametrize("tiers", [None, INT8_4_2, FP8, INT4], ids=["no", "842", "fp8", "int4"])
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("window", [None, 1, 9, 70])
def test_ragged_batches(mode, window, tiers):
    check(build(ALL, mode=mode, window=window, tiers=tiers))


@pytest.mark.parametrize(
    "shape",
    [
        {"group": 1, "kv_heads": 3},
        {"group": 3},
        {"group": 17},
        {"kv_heads": 4, "shared": 2},
        {"kv_heads": 3, "shared": 3, "group": 1, "k_rank": 40},
        {"kv_heads": 2, "group": 6, "mode": "post"},
        {"k_rank": 5, "v_rank": 41, "d": 48},
        {"k_rank": 1, "v_rank": 1},
        {"k_rank": 3, "v_rank": 2, "mode": "post"},
        {"d": 80, "k_rank": 80, "v_rank": 16},
        {"rotary_dim": 16},
        {"d": 33, "rotary_dim": 32},
        {"neox": False},
        {"neox": False, "rotary_dim": 24},
        {"block": 1},
        {"block": 100},
        {"heads_inside": True},
        {"heads_inside": True, "tiers": INT8_4_2},
    ],
    ids=str,
)
def test_shapes_rotary_styles_and_layouts(shape):
    check(build(ALL, **shape))


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiers", [None, INT8_4_2], ids=["no", "842"])
def test_half_precision(mode, dtype, tiers):
    check(build(ALL, mode=mode, dtype=dtype, tiers=tiers))


@pytest.mark.parametrize("tiers", [None, INT8_4_2], ids=["no", "842"])
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projections_of_queries_and_outputs(mode, dtype, tiers):
    check(build(ALL, mode=mode, dtype=dtype, tiers=tiers, projects=True))


@pytest.mark.parametrize(
    "shape",
    [
        {"kv_heads": 4, "shared": 2},
        {"kv_heads": 3, "shared": 3, "group": 1, "k_rank": 40},
        {"k_rank": 5, "v_rank": 41, "d": 48},
        {"k_rank": 1, "v_rank": 1},
        {"d": 256, "k_rank": 64, "v_rank": 200, "group": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_shapes_of_projections(mode, shape):
    check(build(ALL, mode=mode, projects=True, **shape))


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_bases_may_be_wider_than_queries(mode):
    case = build(ALL, mode=mode, dtype=torch.bfloat16, projects=True)
    wide = {name: case.settings[name].float() for name in ("k_up", "v_up")}
    output = run(replace(case, settings=case.settings | wide | {"layout": LatentLayout(16, 24)}))
    assert torch.equal(output, run(case))


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("tokens", [9, 40, 300])
def test_many_tokens_are_projected_too(mode, tokens):
    check(build([(tokens, tokens), (1, 33), (tokens, tokens + 70)], mode=mode, projects=True))


def test_every_fp32_is_rounded_to_fp16_and_bf16_as_torch_does():
    """One token per number, alone in its context: its value latent is the output."""
    steps = torch.arange(-(2**31), 2**31, 2**19 + 1).to(torch.int32)
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 65536.0, 6.1e-5, 6e-8, 3e-8, 2.98e-8, 1e-9])
    ties = torch.arange(0, 2**15, 7).to(torch.int16).view(torch.float16).float() * (1 + 2.0**-11)
    numbers = torch.cat((steps.view(torch.float32), edges, -edges, ties, -ties))
    numbers = numbers[numbers.isfinite()]
    cache = torch.stack((torch.zeros_like(numbers), numbers), dim=-1)[:, None, None]
    for dtype in (torch.bfloat16, torch.float16):
        case = alone(cache, torch.zeros(len(numbers), 1, 1, dtype=dtype))
        expected = numbers.to(dtype)
        assert torch.equal(run(case)[:, 0, 0], expected)


def alone(cache: torch.Tensor, query: torch.Tensor) -> Case:
    """Requests of one token each, in its own page."""
    count = len(cache)
    batch = PagedBatch(
        torch.arange(count + 1, dtype=torch.int32),
        torch.ones(count, dtype=torch.int32),
        torch.arange(count, dtype=torch.int32)[:, None],
        count,
        1,
    )
    settings = {
        "scale": 1.0,
        "layout": LatentLayout(1, 1),
        "sliding_window": None,
        "soft_cap": None,
    }
    return Case(query, cache, batch, settings | {"k_up": None, "v_up": None, "rope": None})


def test_every_fp16_is_read_exactly():
    """One token per number: its value latent is the output."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    cache = torch.stack((torch.zeros_like(numbers), numbers), dim=-1)[:, None, None]
    output = run(alone(cache, torch.zeros(len(numbers), 1, 1, dtype=torch.float16)))
    finite = numbers.isfinite()
    torch.testing.assert_close(output[finite, 0, 0], numbers[finite], rtol=0, atol=0)
    assert not output[~finite].isfinite().any()


@pytest.mark.parametrize("seed", range(12))
def test_any_batch(seed):
    r = random.Random(seed)
    contexts = [r.choice([r.randint(1, 20), r.randint(1, 700)]) for _ in range(r.randint(1, 64))]
    lengths = [(min(length, r.randint(1, 8)), length) for length in contexts]
    shape = {
        "mode": r.choice(["pre", "post"]),
        "kv_heads": 4,
        "shared": r.choice([1, 2, 4]),
        "group": r.randint(1, 5),
        "d": (d := r.choice([32, 64, 80, 96, 128, 256])),
        "k_rank": r.randint(1, 32),
        "v_rank": r.randint(1, 32),
        "rotary_dim": r.choice([None, 2 * r.randint(1, d // 2)]),
        "neox": r.random() < 0.5,
        "dtype": r.choice([torch.float32, torch.bfloat16, torch.float16]),
        "tiers": r.choice([None, INT8_4_2, FP8, INT4, WHOLE]),
        "projects": r.random() < 0.5,
        "window": r.choice([None, r.randint(1, 300)]),
        "block": r.choice([8, 16, 32, 128]),
    }
    # Of one short request the luck of a few roundings would decide.
    draws = 12 if len(lengths) < 6 else 1
    check(*(build(lengths, **shape, seed=seed + more) for more in range(draws)))


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("length", [255, 256, 257, 320, 321, 2048, 8192])
@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_are_split(mode, length, window, monkeypatch):
    monkeypatch.setattr(compiled, "LEAST_PART", 64)
    check(build([(1, length), (4, length // 2)], mode=mode, window=window))


@pytest.mark.parametrize("tiers", [None, INT8_4_2], ids=["no", "842"])
@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("cap", [0.25, 4.0])
def test_soft_caps(mode, cap, tiers, monkeypatch):
    """Of scores up to 20, contexts in parts among them."""
    monkeypatch.setattr(compiled, "LEAST_PART", 64)
    shape = {"mode": mode, "tiers": tiers, "soft_cap": cap, "magnitude": 8.0}
    for window in (None, 9):
        check(build([*ALL, (1, 2000)], window=window, **shape))
    check(build(ALL, projects=True, dtype=torch.bfloat16, **shape))


def test_more_threads_than_work():
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        check(build([(1, 3)], kv_heads=1), build([(1, 5), (1, 1000)], mode="post"))
    finally:
        torch.set_num_threads(before)


def test_shared_pages():
    case = build([(1, 48), (3, 48)])
    case.batch.block_table[1, :2] = case.batch.block_table[0, :2]
    check(case)


def test_a_latent_that_is_not_finite_reaches_only_those_who_see_it():
    case = build([(1, 100), (1, 100), (3, 100)], window=20)
    pages = case.batch.block_table[:, 99 // 16].long()
    case.cache[case.batch.block_table[0, 10 // 16], :, 10 % 16] = torch.nan  # before the window
    case.cache[pages[1], :, 99 % 16] = torch.nan
    case.cache[pages[2], :, 98 % 16] = torch.inf  # after the first of three query tokens
    output = run(case)
    assert output[[0, 2]].isfinite().all()
    assert not output[[1, 3, 4]].isfinite().any()


def test_a_value_that_is_not_finite_reaches_only_those_who_see_it():
    """Though tokens of a prompt are multiplied together."""
    case = build([(70, 170), (9, 9), (1, 200)], window=40, mode="post")
    for request, position in ((0, 133), (1, 5), (2, 150)):
        page = case.batch.block_table[request, position // 16].long()
        case.cache[page, :, position % 16, 16:] = torch.nan
    output = run(case)
    finite = torch.ones(80, dtype=torch.bool)
    finite[33:70], finite[75:79] = False, False  # 100 tokens were there before; 200 are seen from
    assert torch.equal(output.isfinite().all(dim=(1, 2)), finite)
    assert not output[~finite].isfinite().any()


@pytest.mark.parametrize("tier", range(6))
def test_a_scale_of_nan_reaches_only_those_who_see_it(tier):
    """Of any tier of keys or values, whose quotients the others are multiplied by, too."""
    case = build([(1, 100), (1, 100), (1, 300)], tiers=WHOLE, dtype=torch.bfloat16)
    keys, values = case.settings["layout"].runs
    of = (*keys, *values)[tier]
    page = case.batch.block_table[1, 77 // 16].long()
    case.cache[page, 0, 77 % 16, of.scale] = 255
    finite = torch.ones(case.shape, dtype=torch.bool)
    channels = slice(of.channel, of.channel + of.tier.channels) if of in values else slice(None)
    finite[1, :2, channels] = False  # query heads of the first KV head
    assert torch.equal(run(case).isfinite(), finite)


def test_heads_of_one_latent_in_items_and_parts_of_their_own():
    """One request that is too short to be shared out as one item for all of its heads."""
    shape = {"kv_heads": 4, "shared": 4, "tiers": WHOLE, "dtype": torch.bfloat16}
    check(build([(1, 700)], **shape), build([(5, 600)], **shape))
    check(build([(1, 700)], mode="post", **shape), build([(5, 600)], mode="post", **shape))


def test_what_was_made_of_other_tensors_is_not_used():
    case = build(ALL, dtype=torch.bfloat16)
    outputs = []
    for changed in (
        {},
        {"rope": case.settings["rope"]._replace(is_neox=False)},
        {"k_up": case.settings["k_up"] * 2},
        {"rope": case.settings["rope"]._replace(cos_sin=-case.settings["rope"].cos_sin)},
    ):
        one = replace(case, settings=case.settings | changed)
        check(one)
        outputs.append(run(one))
    moved = replace(case, cache=case.cache.flip(0).contiguous())
    moved.batch.block_table[:] = len(case.cache) - 1 - moved.batch.block_table
    moved.batch.block_table[moved.batch.block_table < 0] = UNUSED
    assert torch.equal(run(moved), outputs[0])
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_bases_that_are_written_to_or_moved_are_read_again(mode):
    """As vLLM's reload_weights does in place, and Module.to."""
    case = build(ALL, mode=mode, projects=True)
    run(case)
    for name in ("k_up", "v_up"):
        basis = case.settings[name]
        basis.copy_(2 * basis)
        check(case)
        basis.data = basis.flip(0)
        check(case)


def test_a_step_of_everything():
    """Prompts, chunks of them, drafts to verify and decode steps, long and short."""
    lengths = [(1, 700), (200, 200), (64, 321), (5, 90), (1, 1), (130, 259), (3, 64)]
    for shape in ({}, {"mode": "post"}, {"shared": 2, "tiers": WHOLE, "dtype": torch.bfloat16}):
        check(build(lengths, kv_heads=4, **shape), build(lengths, kv_heads=4, window=50, **shape))


def test_scores_of_any_size():
    case = build([(1, 300), (1, 70)], mode="post")
    for factor in (1e-30, 30.0, 1e4):
        check(replace(case, query=case.query * factor))


def test_torch_serves_where_numba_is_missing(monkeypatch):
    """And gives the same."""
    case = build([(1, 40), (30, 30), (2, 90), (140, 164), (1, 5)])
    case.batch.block_table[case.batch.block_table == UNUSED] = 0  # torch reads whole rows of it
    for dtype in (torch.float32, torch.bfloat16):
        outputs = []
        for there in (True, False):
            monkeypatch.setattr(native, "is_there", lambda there=there: there)
            monkeypatch.setattr(team, "team", team.team if there else None)
            case.settings["layout"].memo.clear()
            output = torch.full((174, 4, 24), torch.nan, dtype=dtype)
            latent_attention.attend(case.query, case.cache, case.batch, output, **case.settings)
            outputs.append(output)
        monkeypatch.undo()
        torch.testing.assert_close(*outputs)
    monkeypatch.setattr(native, "is_there", lambda: False)
    compiled.warm_up()


def test_what_is_kept_of_a_batch_goes_with_it():
    case = build([(1, 40), (30, 30)])
    output = torch.empty(31, 4, 24)
    compiled.attend(case.query, case.cache, case.batch, output, **case.settings)
    batch = weakref.ref(case.batch)
    del case
    gc.collect()
    assert batch() is None


def test_concurrent_callers():
    cases = [build(ALL, mode=mode, seed=seed) for mode in ("pre", "post") for seed in range(4)]
    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for expected, found in zip(alone, pool.map(run, cases), strict=True):
                torch.testing.assert_close(found, expected)


def test_works_in_a_forked_process():
    """As vLLM's workers are, from a parent that used neither path in more than one thread."""
    program = """
import os, torch
torch.set_num_threads(1)
from compiled_cases import ALL, build, check
check(build(ALL))
child = os.fork()
if not child:
    torch.set_num_threads(2)
    check(build(ALL), build([(1, 3000)]))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=300)


def test_other_code_may_look_at_the_namespaces_of_all_modules():
    """vLLM does when another engine starts in this process."""
    from llvmlite.binding import ffi

    team.team()
    assert vars(ffi.lib).get("kernel") is None
    for module in list(sys.modules.values()):
        for value in list((getattr(module, "__dict__", None) or {}).values()):
            if type(value) is type(ffi.lib):
                assert vars(value).get("kernel") is None


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_process_changes_nothing(default):
    case = build([(1, 40), (3, 70)], dtype=torch.bfloat16)
    before, expected = torch.get_default_dtype(), run(case)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(run(case), expected)
    finally:
        torch.set_default_dtype(before)
