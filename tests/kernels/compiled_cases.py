"""Batches for the compiled attention, and what it gives of them."""

import functools

import paged_cases
import torch
from paged_cases import Case

from vllm_svd.kernels.latent_attention import compiled

INT8_4_2 = (((8, "int8"), (4, "int4"), (4, "int2")), ((4, "int8"), (12, "int4"), (8, "int2")))
FP8 = (((16, "fp8_e4m3"),), ((24, "fp8_e4m3"),))
INT4 = (((16, "int4"),), ((24, "int4"),))
UNUSED = 2**31 - 1
# Of whole words, as bf16 pairs want them, and of halves of one.
WHOLE = (((8, "int8"), (16, "int4"), (24, "int2")), ((8, "int8"), (8, "int4"), (16, "int2")))
ALL = [(1, 1), (1, 40), (7, 7), (8, 53), (1, 33), (5, 48), (2, 200)]


build = functools.partial(paged_cases.build, unused=UNUSED)


def run(case: Case) -> torch.Tensor:
    output = torch.full(case.shape, torch.nan, dtype=case.query.dtype)
    assert compiled.attend(case.query, case.cache, case.batch, output, **case.settings)
    return output


check = functools.partial(paged_cases.check, run)
