"""8-bit factors: what rounding loses, what is stored, and what comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.factors import LowRankInt8Factors, of_parts
from vllm_svd.format import LowRankInt8

ITEM_BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}


def pair(rows, columns, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=g, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=g, dtype=torch.float64)
    decay = 0.7 ** torch.arange(rank, dtype=torch.float64)
    return A * decay[:, None], B


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    tails=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 99),
)
def test_rounding_moves_an_entry_by_half_a_step_at_most_and_tails_not_at_all(
    rows, columns, tails, seed
):
    A, B = pair(rows, columns, min(rows, columns), seed)
    a_tail, b_tail = int(tails[0] * columns), int(tails[1] * rows)
    made = LowRankInt8Factors.quantize(A, B, a_tail, b_tail)
    for whole, rounded, scale, tail in (
        (A, made.A, made.A_scale, a_tail),
        (B.T, made.B.T, made.B_scale, b_tail),
    ):
        body = whole.shape[1] - tail
        steps = (rounded - whole)[:, :body] / scale[:, None].double()
        assert (steps.abs() <= 0.5 + 1e-4).all()  # 127 units of the scale's own rounding, 2^-24
        assert torch.equal(rounded[:, body:], whole[:, body:])
    assert torch.equal(made.dense(), made.B @ made.A)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("tails", [(0, 0), (3, 0), (0, 5), (2, 2), (7, 9)])
def test_what_is_stored_is_what_the_format_says_and_comes_back(dtype, tails):
    A, B = pair(9, 7, 4)
    made = LowRankInt8Factors.quantize(A, B, *tails).to(dtype)
    config, tensors = made.config(), made.tensors("linear")
    assert config == LowRankInt8(
        out_features=9, in_features=7, rank=4, a_tail=tails[0], b_tail=tails[1]
    )
    expected = {name: stored.shape for name, stored in config.tensors("linear").items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert stored == config.bytes(ITEM_BYTES[dtype])
    parts = {name.removeprefix("linear."): tensor for name, tensor in tensors.items()}
    assert torch.equal(of_parts(config, parts).dense(), made.dense())


def test_only_tails_and_correction_take_the_dtype_of_the_model():
    A, B = pair(9, 7, 4)
    made = LowRankInt8Factors.quantize(A, B, 0, 2)
    made = made.rebuilt(made.parts(), torch.ones(9)).to(torch.bfloat16)
    dtypes = {name: part.dtype for name, part in made.parts().items()}
    assert dtypes.pop("B_tail") == made.correction.dtype == torch.bfloat16
    assert set(dtypes.values()) == {torch.int8, torch.float32}


def test_its_product_is_that_of_its_dense_matrix():
    A, B = pair(9, 7, 4)
    made = LowRankInt8Factors.quantize(A, B, 0, 2)
    x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.apply(x), x @ made.dense().T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e-45, 1e-39, 1e-37, 1e30])
def test_a_row_of_any_scale_is_finite_and_rounded_within_fp32(scale):
    """Too small for a normal scale in fp32 is nothing; else half a step, as for any row."""
    A, B = pair(6, 5, 3)
    A[1] *= scale
    made = LowRankInt8Factors.quantize(A, B)
    bound = 0.51 * A.abs().amax(1) / 127 + 127 * torch.finfo(torch.float32).tiny
    assert ((made.A - A).abs() <= bound[:, None]).all()
    assert torch.isfinite(made.A_scale).all() and (made.A_scale > 0).all()
