"""The compiled attention by the vector units of a CPU: pairs in bf16, tiers, and CPUs without."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled_cases import ALL, FP8, WHOLE, build, check
from paged_cases import Case

from vllm_svd.kernels import native
from vllm_svd.kernels.latent_layout import LatentLayout

if native.is_there():
    from vllm_svd.kernels.native import features, matrix

pytestmark = [
    pytest.mark.skipif(not native.is_there(), reason="needs numba"),
    pytest.mark.usefixtures("a_team"),
]


PAIRED = [
    WHOLE,
    (((32, "int2"),), ((48, "int2"),)),
    (((8, "int2"),), ((8, "int2"),)),
    (((40, "int4"),), ((128, "int4"), (8, "int2"))),
    (((4, "int4"),), ((256, "int4"),)),
    (((4, "int8"),), ((20, "int8"), (300, "int2"))),
    (((8, "fp8_e4m3"), (16, "int2")), ((4, "fp8_e4m3"), (8, "int4"))),
    (((64, "int8"), (64, "int4")), ((16, "int4"), (12, "int4"))),
    (((4, "int2"), (16, "int8")), ((4, "int2"), (16, "int8"))),  # not words
]


@pytest.mark.parametrize("tiers", PAIRED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiers_of_any_size(tiers, dtype):
    """Bases that bf16 has exactly, whatever the dtype: where the CPU can, pairs are multiplied."""
    for shape in ({}, {"kv_heads": 4, "shared": 2}, {"block": 12, "d": 48, "rotary_dim": 16}):
        case = build(ALL, tiers=tiers, **shape)
        settings = case.settings | {"k_up": case.settings["k_up"].bfloat16().to(dtype)}
        check(replace(case, settings=settings))


def in_fp32(case: Case) -> Case:
    """Of the same latents and bases: no rounding of queries and outputs hides one of theirs."""
    return replace(case, query=case.query.float())


@pytest.mark.parametrize("k_rank", [2, 6, 16, 30, 40, 64])
def test_pairs_of_any_rank(k_rank):
    for shape in ({"d": 64}, {"d": 40, "neox": False}, {"d": 24, "rotary_dim": 16, "block": 7}):
        check(in_fp32(build(ALL, k_rank=k_rank, dtype=torch.bfloat16, **shape)))


def test_products_in_bf16_are_exact_where_they_are_used():
    """The same basis, with and without a last bit that bf16 has not: pairs only without."""
    case = build(ALL, dtype=torch.bfloat16)
    inexact = case.settings["k_up"].float()
    inexact[0, 0, 0] *= 1 + 2**-12
    layouts = [LatentLayout(16, 24) for _ in range(2)]
    for layout, basis in zip(layouts, (case.settings["k_up"], inexact), strict=True):
        settings = case.settings | {"k_up": basis, "layout": layout}
        check(in_fp32(replace(case, settings=settings)))
    paired = [layout.memo["attend"].bases.arguments["paired"] for layout in layouts]
    assert paired == [features.has("avx512bf16", "avx512bw"), False]


# What LLVM calls the units of CPUs that others have.
_AVX2 = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
_AVX512 = f"{_AVX2},+avx512f,+avx512bw,+avx512vl,+avx512dq"
OTHER_CPUS = {
    "haswell": _AVX2,
    "skylake-avx512": _AVX512,
    "cooperlake": f"{_AVX512},+avx512bf16",
}
NEWER = ("avx512f", "avx512bf16", "avx512vbmi", "amx-bf16")


@pytest.mark.parametrize("cpu", OTHER_CPUS)
def test_other_cpus(cpu):
    """With fewer units than this one may have, which this one then has to do without, too."""
    if not features.has(*OTHER_CPUS[cpu].replace("+", "").split(",")):
        pytest.skip(f"this CPU cannot do all that a {cpu} does")
    lacks = [name for name in NEWER if f"+{name}" not in OTHER_CPUS[cpu].split(",")]
    program = f"""
import torch
from compiled_cases import ALL, INT8_4_2, WHOLE, build, check
from vllm_svd.kernels.native import features
assert not any(features.has(name) for name in {lacks})
torch.set_num_threads(2)
for shape in ({{}}, {{"tiers": INT8_4_2}}, {{"tiers": WHOLE, "kv_heads": 4, "shared": 2}}):
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("pre", "post"):
            check(build([*ALL, (90, 130)], mode=mode, dtype=dtype, d=64, **shape))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    environment |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": OTHER_CPUS[cpu]}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=300)


@pytest.mark.parametrize("head", [{"d": 32}, {"d": 40}, {"d": 80, "rotary_dim": 32}, {"d": 256}])
@pytest.mark.parametrize("tiers", [None, WHOLE, FP8], ids=["no", "842", "fp8"])
def test_matrix_units(head, tiers):
    """Of which tiles are whole: what pads them meets latents of other tiers, or none."""
    if not matrix.THERE:
        pytest.skip("this CPU has no matrix units")
    for shape in ({}, {"neox": False}, {"kv_heads": 4, "shared": 2}):
        cases = [
            build(ALL, dtype=torch.bfloat16, tiers=tiers, **head, **shape, seed=s) for s in (0, 1)
        ]
        check(*map(in_fp32, cases))
        for case in cases:
            assert case.settings["layout"].memo["attend"].bases.arguments["by_matrix"]
