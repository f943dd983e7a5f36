"""Products of half-precision tensors: widened where the CPU would emulate them."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from vllm_svd.kernels import products

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulating(monkeypatch):
    """As on a CPU without units for half precision, whatever this one has."""
    monkeypatch.setattr(products, "_EMULATES_BF16", True)
    monkeypatch.setattr(products, "_EMULATES_FP16", True)


def operands(rows, width, out, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, width), (out, width), (out,))
    )
    return x, weight * width**-0.5, bias


def error(found, expected):
    return float((found.double() - expected).norm())


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    out=st.integers(1, 90),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(HALVES),
    biased=st.booleans(),
)
def test_linear_is_as_near_to_fp64_as_a_product_rounded_once(rows, width, out, seed, dtype, biased):
    x, weight, bias = operands(rows, width, out, dtype, seed)
    bias = bias if biased else None
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    found = products.linear(x, weight, bias)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    if rows < products.FEW_ROWS:  # torch's own product, which may round sums more than once
        assert torch.equal(found, F.linear(x, weight, bias))
    else:
        assert error(found, expected) <= 1.1 * error(expected.to(dtype), expected) + 1e-6


def test_large_weights_are_widened_in_tiles(monkeypatch):
    x, weight, bias = operands(9, 40, 23, torch.bfloat16)
    whole = products.linear(x, weight, bias)
    monkeypatch.setattr(products, "TILE_ELEMENTS", 7 * 40)
    assert torch.equal(products.linear(x, weight, bias), whole)


@pytest.mark.parametrize("shape", [(0, 16), (2, 3, 16), (1, 16), (16,)])
def test_leading_dimensions_are_kept(shape):
    _, weight, bias = operands(1, 16, 5, torch.bfloat16)
    assert products.linear(torch.ones(shape).bfloat16(), weight, bias).shape == (*shape[:-1], 5)


def test_one_compiled_graph_serves_any_number_of_rows():
    compiled = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    graph = torch.compile(products.linear, backend=compiled, fullgraph=True, dynamic=True)
    for rows in (50, 8, products.FEW_ROWS, 2):
        x, weight, bias = operands(rows, 48, 24, torch.bfloat16)
        expected = F.linear(x.double(), weight.double(), bias.double())
        once = error(expected.to(x.dtype), expected)
        found = graph(x, weight, bias)
        if rows < products.FEW_ROWS:  # the graph decides when it runs
            assert torch.equal(found, F.linear(x, weight, bias))
        else:
            assert error(found, expected) <= 1.1 * once
    assert compiled.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("tokens", "heads", "rows"), [(1, 2, 1), (5, 1, 3), (64, 8, 4), (0, 2, 2)])
@pytest.mark.parametrize("wide", [False, True])
def test_per_head_is_a_product_of_every_head(dtype, tokens, heads, rows, wide):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, heads, rows, 48, generator=generator).to(dtype)
    bases = torch.randn(heads, 48, 20, generator=generator).to(dtype)
    found = products.per_head(x, products.widened(bases) if wide else bases)
    expected = torch.einsum("thgn,hnm->thgm", x.double(), bases.double())
    assert found.dtype == dtype
    rounding = error(expected.to(dtype), expected)
    sums = 48 * torch.finfo(torch.float32).eps * float(expected.norm())
    assert error(found, expected) <= 1.1 * rounding + sums
