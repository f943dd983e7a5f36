"""Codes that the Triton kernels read as words: every one, in the order of channels_of."""

import pytest
import torch
import triton
import triton.language as tl

from vllm_svd.format import STORES, Tier
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_tiers_triton import (
    _integers_of_words,
    _sevens_and_signs,
    _small_of_words,
    channels_of,
    parts_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 64


@triton.jit
def _read(words, found, less, order, size: tl.constexpr, shift: tl.constexpr, bits: tl.constexpr):
    row, word, channel = tl.arange(0, 4), tl.arange(0, size // 4), tl.arange(0, size)
    codes = tl.load(words + row[:, None] * (size // 4) + word[None, :])
    dtype: tl.constexpr = found.dtype.element_ty
    place = row[:, None] * size + channel[None, :]
    if bits < 8:
        values = _small_of_words(codes, size, shift, (1 << bits) - 1, dtype)
    elif dtype == tl.bfloat16:  # which the interpreter cannot subtract
        values, signs = _sevens_and_signs(codes, size)
        tl.store(less + place, signs)
    else:
        values = _integers_of_words(codes, size, dtype)
    tl.store(found + place, values)
    tl.store(order + channel, channels_of(size, True))


CASES = [(4, 0), (4, 4), (2, 0), (2, 2), (2, 4), (2, 6), (8, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "shift"), CASES, ids=str)
def test_every_byte_in_every_place_of_a_word(dtype, bits, shift):
    """16 and the code of few bits, or the signed byte: of all 256 bytes, in all four places.

    Signed bytes in bf16 are subtracted here: on a CPU no test runs the kernel's own difference.
    """
    codes = torch.stack([torch.arange(256).roll(i) for i in range(4)]).reshape(-1)
    for rows in codes.to(torch.uint8).view(-1, 4, SIZE):
        found, less = torch.zeros(2, 4, SIZE, dtype=dtype, device=DEVICE)
        order = torch.empty(SIZE, dtype=torch.int32, device=DEVICE)
        words = rows.to(DEVICE).view(torch.int32)
        _read[(1,)](words, found, less, order, SIZE, shift, bits)
        integers = 16 + ((rows.int() >> shift) & ((1 << bits) - 1))
        expected = rows.view(torch.int8).int() if bits == 8 else integers
        assert torch.equal((found - less).cpu().int(), expected[:, order.long().cpu()])


def test_what_is_read_as_words():
    """Integers, in half precision; codes begin with a word, whatever comes before them."""
    tiers = tuple(Tier(channels=12, store=store) for store in ("int8", "int4", "int2"))
    layout = LatentLayout(36, 4, tiers, (Tier(channels=4, store="fp8_e4m3"),))
    for dtype in (torch.float32, torch.bfloat16):
        parts = [part for side in parts_of(layout, dtype) for part in side]
        half = dtype == torch.bfloat16
        assert {(STORES[part[6]], part[3]) for part in parts} == {
            *(("int8", half), ("int4", half), ("int2", half), ("fp8_e4m3", False))
        }
        assert not any(part[4] % 4 for part in parts)
