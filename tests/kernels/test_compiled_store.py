"""The compiled store of tiers writes the bytes of the codec, and no others."""

import pytest
import torch

from vllm_svd.format import Tier
from vllm_svd.kernels import native
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import compiled, reference

pytestmark = pytest.mark.skipif(not native.is_there(), reason="needs numba")


def tiers(**channels):
    return tuple(Tier(channels=count, store=store) for store, count in channels.items())


LAYOUTS = [
    LatentLayout(44, 12, tiers(int8=8, int4=20, int2=16), tiers(int4=12)),
    LatentLayout(24, 36, tiers(fp8_e4m3=24), tiers(int8=32, int2=4)),
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
    compiled.store(key, value, caches[1], slots, layout)
    assert torch.equal(*caches)
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
