"""The compiled store writes the latents, or the bytes of the codec, and no others."""

from dataclasses import replace

import pytest
import torch
from every_kernel import same_slots

from vllm_svd import codec
from vllm_svd.format import Tier
from vllm_svd.kernels import native
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import compiled, reference

pytestmark = [
    pytest.mark.skipif(not native.is_there(), reason="needs numba"),
    pytest.mark.usefixtures("a_team"),
]


def tiers(**channels):
    return tuple(Tier(channels=count, store=store) for store, count in channels.items())


LAYOUTS = [
    LatentLayout(44, 12, tiers(int8=8, int4=20, int2=16), tiers(int4=12)),
    LatentLayout(24, 40, tiers(fp8_e4m3=24), tiers(int8=32, int2=8)),
]


def latents(layout, tokens, groups, dtype):
    """Of magnitudes between 2^-9 and 2^9."""
    g = torch.Generator().manual_seed(3)
    size = 2 ** (18 * torch.rand(tokens, groups, 1, generator=g) - 9)
    both = size * torch.randn(tokens, groups, layout.k_rank + layout.v_rank, generator=g)
    return both.to(dtype).split([layout.k_rank, layout.v_rank], dim=-1)  # views


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_inside", [False, True])
def test_bytes_are_those_of_the_codec(layout, dtype, heads_inside):
    key, value = latents(layout, 50, 3, dtype)
    key[7] = 0
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:50]
    slots[[3, 20]] = -1
    caches = [torch.full((4, 3, 16, layout.width), 77, dtype=torch.uint8) for _ in range(2)]
    if heads_inside:
        caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
    reference.store(key, value, caches[0], slots, layout)
    assert compiled.store(key, value, caches[1], slots, layout)
    assert same_slots(layout, *caches)
    assert int((caches[1] != 77).any(-1).sum()) == 48 * 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_read_as_nan(layout, bad):
    key, value = latents(layout, 2, 1, torch.float32)
    key[1, 0, -1] = bad  # in the last tier
    cache = torch.zeros(1, 1, 16, layout.width, dtype=torch.uint8)
    compiled.store(key, value, cache, torch.tensor([0, 1]), layout)
    found, values = layout.read(cache[0, 0, :2])
    assert found[0].isfinite().all() and values.isfinite().all()
    last = layout.k_tiers[-1].channels
    assert found[1, -last:].isnan().all() and found[1, :-last].isfinite().all()


@pytest.mark.parametrize("layout", [LatentLayout(13, 6), *LAYOUTS], ids=["plain", "842", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("heads", [3, 6])
def test_few_tokens_are_projected_within_rounding(monkeypatch, layout, dtype, tokens, heads):
    """Latents in the cache are as near to fp64 as those of a product in the model's dtype."""
    monkeypatch.setattr(compiled, "FEW_CHANNELS", 64)  # so that both threads take part
    g = torch.Generator().manual_seed(tokens)
    groups, d = 3, 16
    qkv = torch.randn(tokens, 2 * heads * d, generator=g).to(dtype)  # of which both are views
    key, value = (part.view(tokens, heads, d) for part in qkv.split(heads * d, dim=-1))
    down = tuple(
        torch.randn(groups, rank, heads // groups * d, generator=g).div(8).to(dtype)
        for rank in (layout.k_rank, layout.v_rank)
    )
    size, slot_dtype = (tokens // 8 + 2) * 8, torch.uint8 if layout.quantised else dtype
    slots = torch.randperm(size, generator=g)[:tokens]
    cache = torch.zeros(size // 8, groups, 8, layout.width, dtype=slot_dtype)
    assert compiled.store(key, value, cache, slots, replace(layout, memo={}), down)
    found = layout.read(cache[slots // 8, :, slots % 8])
    for x, basis, stored, tiers in zip(
        (key, value), down, found, (layout.k_tiers, layout.v_tiers), strict=True
    ):
        wide = x.double().reshape(tokens, groups, 1, -1)
        exact = (wide @ basis.double().transpose(1, 2))[:, :, 0]
        rounded = exact.to(dtype)
        plain = codec.stored(rounded.float(), tiers) if tiers else rounded
        error, plain_error = (float((z.double() - exact).norm()) for z in (stored, plain))
        assert error <= 1.01 * plain_error + 1e-6 * float(exact.norm())


def test_bases_that_moved_are_read_where_they_are():
    layout, g = LatentLayout(8, 8), torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 16, generator=g)
    down, cache = tuple(torch.randn(2, 2, 8, 16, generator=g)), torch.zeros(1, 2, 16, 16)
    for factor in (1, 2):
        down[0].data = torch.full_like(down[0], factor)
        assert compiled.store(key, value, cache, torch.tensor([0]), layout, down)
        torch.testing.assert_close(cache[0, :, 0, 0], factor * key[0].sum(-1))


def test_many_tokens_are_projected_by_blas(monkeypatch):
    layout, g = LatentLayout(8, 8), torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 20, 2, 16, generator=g)
    down = tuple(torch.randn(2, 2, 8, 16, generator=g))
    caches, calls = torch.zeros(2, 2, 2, 16, 16), []
    project = compiled.project
    monkeypatch.setattr(compiled, "project", lambda *a: calls.append(few) or project(*a))
    for cache, few in zip(caches, (1 << 30, 0), strict=True):
        monkeypatch.setattr(compiled, "FEW_PRODUCTS", few)
        assert compiled.store(key, value, cache, torch.arange(20) + 5, layout, down)
    assert calls == [0, 0]
    assert int((caches[0] != 0).any(-1).sum()) == 40
    torch.testing.assert_close(*caches)
