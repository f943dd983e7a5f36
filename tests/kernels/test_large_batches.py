"""Batches of 64 requests and contexts of 8,192 tokens, with prefixes that requests share."""

import itertools
import random

import pytest
from every_kernel import KERNELS, ON_CPU, THREE, build, check, half
from paged_cases import Case

from vllm_svd.kernels.latent_attention import split_triton, triton

LONGEST = 8192
INT8_FP8 = ((16, "int8"),), ((24, "fp8_e4m3"),)
SHAPES = [
    {},
    {"mode": "post", "tiers": (THREE, THREE)},
    {"kv_heads": 4, "shared": 2, "neox": False, "tiers": (THREE, THREE), "d": 64},
]


def ragged(longest: int, seed: int = 0) -> list[tuple[int, int]]:
    """64 requests of 1 to `longest` tokens, of every order of magnitude; a few verify drafts."""
    r = random.Random(seed)
    contexts = [1, longest, *(round(longest ** r.random()) for _ in range(62))]
    r.shuffle(contexts)
    return [(min(length, r.choice([1, 1, 1, 4])), length) for length in contexts]


def with_prefixes(case: Case) -> Case:
    """Every other request has the pages of the one before, as far as both fill them."""
    lengths, table = case.batch.seq_lens.tolist(), case.batch.block_table
    for one, (length, after) in enumerate(itertools.pairwise(lengths)):
        if one % 2 == 0:
            filled = min(length, after) // case.cache.shape[2]
            table[one + 1, :filled] = table[one, :filled]
    return case


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_64_requests(kernel, shape):
    check(kernel, with_prefixes(build(ragged(300), **shape)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_64_requests_in_half_precision(kernel):
    shape = {"kv_heads": 2, "shared": 2, "tiers": (THREE, THREE), "dtype": half(kernel)}
    check(kernel, with_prefixes(build(ragged(300), **shape)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_long_context_beside_the_shortest(kernel, shape):
    check(kernel, build([(1, LONGEST), (1, 1)], **shape))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_long_context_in_as_many_parts_as_on_a_gpu(monkeypatch, shape):
    monkeypatch.setattr(split_triton, "processors", lambda _: 132)
    check(triton, build([(1, LONGEST), (1, 1)], **shape))


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("shape", [{"shared": 2}, {"mode": "post", "tiers": INT8_FP8}], ids=str)
def test_64_requests_of_up_to_8192_tokens(kernel, shape):
    """More than the interpreter does in a minute; tiers whose scales are found at once."""
    check(kernel, with_prefixes(build(ragged(LONGEST), dtype=half(kernel), **shape)))
