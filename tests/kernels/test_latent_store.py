"""Both stores write exactly the given slots, bit for bit, in any physical layout."""

import pytest
import torch

from vllm_svd.kernels.latent_store import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernel", [reference, triton])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_writes_only_its_slots(kernel, heads_inside, dtype):
    g = torch.Generator().manual_seed(0)
    key = torch.randn(5, 3, 12, generator=g).to(DEVICE, dtype)
    value = torch.randn(5, 3, 20, generator=g).to(DEVICE, dtype)
    slots = torch.tensor([17, 3, -1, 40, 0], device=DEVICE)
    cache = torch.full((4, 3, 16, 32), torch.nan, dtype=dtype, device=DEVICE)
    if heads_inside:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    kernel.store(key, value, cache, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stored = cache[slot // 16, :, slot % 16]
            assert torch.equal(stored, torch.cat((key[token], value[token]), dim=-1))
    assert int(cache.isnan().sum()) == cache.numel() - 4 * 3 * 32


@pytest.mark.parametrize("kernel", [reference, triton])
def test_strided_latents(kernel):
    """Keys and values may be views, as slices of one projection's output are."""
    both = torch.randn(2, 3, 32, device=DEVICE)
    cache = torch.zeros(1, 3, 16, 32, device=DEVICE)
    kernel.store(both[..., :12], both[..., 12:], cache, torch.tensor([4, 9], device=DEVICE))
    assert torch.equal(cache[0, :, 4], both[0]) and torch.equal(cache[0, :, 9], both[1])
