"""Both stores write exactly the given slots, bit for bit, in any physical layout."""

import pytest
import torch
from every_kernel import same_slots, sides
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_svd import codec
from vllm_svd.format import STORES, Tier
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import reference, triton
from vllm_svd.kernels.latent_tiers_triton import bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TIERS = [
    ((Tier(channels=16, store="int8"),), (Tier(channels=20, store="int4"),)),
    ((Tier(channels=12, store="fp8_e4m3"),), (Tier(channels=4, store="int2"),)),
    (
        (Tier(channels=4, store="int8"), Tier(channels=36, store="int2")),
        (
            Tier(channels=8, store="fp8_e4m3"),
            Tier(channels=12, store="int4"),
            Tier(channels=4, store="int2"),
        ),
    ),
]


def tiered(k_tiers: tuple[Tier, ...], v_tiers: tuple[Tier, ...]) -> LatentLayout:
    ranks = [sum(tier.channels for tier in side) for side in (k_tiers, v_tiers)]
    return LatentLayout(*ranks, k_tiers, v_tiers)


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random latents whose magnitudes differ from token to token."""
    g = torch.Generator().manual_seed(seed)
    magnitudes = 2 ** (12 * torch.rand(*shape[:-1], 1, generator=g) - 6)
    return torch.randn(*shape, generator=g) * magnitudes


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
    kernel.store(key, value, cache, slots, LatentLayout(12, 20))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stored = cache[slot // 16, :, slot % 16]
            assert torch.equal(stored, torch.cat((key[token], value[token]), dim=-1))
    assert int(cache.isnan().sum()) == cache.numel() - 4 * 3 * 32


@pytest.mark.parametrize("kernel", [reference, triton])
@pytest.mark.parametrize("quantised", [False, True])
def test_strided_latents(kernel, quantised):
    """Keys and values may be views, as slices of one projection's output are."""
    layout = tiered(*TIERS[0]) if quantised else LatentLayout(16, 20)
    both = latents(2, 3, 36).to(DEVICE)
    key, value = both[..., :16], both[..., 16:]
    dtype = torch.uint8 if quantised else torch.float32
    cache = torch.zeros(1, 3, 16, layout.width, device=DEVICE, dtype=dtype)
    kernel.store(key, value, cache, torch.tensor([4, 9], device=DEVICE), layout)
    assert same_slots(layout, cache[0, :, [4, 9]].transpose(0, 1), layout.write(key, value))


@pytest.mark.parametrize("kernel", [reference, triton])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiers", TIERS, ids=["8+4", "fp8+2", "all"])
def test_tiers_are_those_of_the_codec(kernel, heads_inside, dtype, tiers):
    """Scales are table entries and quotients correctly rounded: no rounding can go another way.

    Latents in bf16 often lie midway between two codes.
    """
    layout = tiered(*tiers)
    key, value = latents(5, 2, layout.k_rank), latents(5, 2, layout.v_rank, seed=1)
    key[1, 0] = 0
    value[3, 1] *= 2.0**40  # beyond every scale
    value[4, 0] *= 2.0**-40
    key, value = key.to(DEVICE, dtype), value.to(DEVICE, dtype)
    slots = torch.tensor([17, 3, -1, 40, 0], device=DEVICE)
    cache = torch.full((4, 2, 16, layout.width), 7, dtype=torch.uint8, device=DEVICE)
    if heads_inside:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    expected = torch.full_like(cache, 7)
    written = layout.write(key, value)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, :, slot % 16] = written[token]
    kernel.store(key, value, cache, slots, layout)
    assert same_slots(layout, cache, expected)


def layouts() -> st.SearchStrategy[LatentLayout]:
    """Ranks in the model's dtype, or tiers."""

    def of(*both: tuple[tuple[int, str], ...]) -> LatentLayout:
        return tiered(*(tuple(Tier(channels=c, store=s) for c, s in side) for side in both))

    ranks = st.integers(1, 70)
    return st.one_of(st.builds(LatentLayout, ranks, ranks), st.builds(of, sides(), sides()))


@given(
    layout=layouts(),
    slots=st.permutations(range(96)).flatmap(
        lambda slots: st.integers(1, 64).map(lambda tokens: slots[:tokens])
    ),
    padding=st.sets(st.integers(0, 63)),
    groups=st.integers(1, 3),
    block=st.sampled_from([1, 16, 24, 96]),
    heads_inside=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_store(layout, slots, padding, groups, block, heads_inside, dtype, seed):
    """Slots hold what the layout makes of their token, bit for bit; all others are left alone."""
    slots = torch.tensor(slots)
    slots[[token for token in padding if token < len(slots)]] = -1
    both = latents(len(slots), groups, layout.k_rank + layout.v_rank, seed=seed).to(DEVICE, dtype)
    key, value = both[..., : layout.k_rank], both[..., layout.k_rank :]
    stored = torch.uint8 if layout.quantised else dtype
    shape = (96 // block, groups, block, layout.width)
    cache = torch.full(shape, 7, dtype=stored, device=DEVICE)
    if heads_inside:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    expected, written = cache.clone(), layout.write(key, value)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // block, :, slot % block] = written[token]
    triton.store(key, value, cache, slots.to(DEVICE), layout)
    assert same_slots(layout, cache, expected)


@pytest.mark.parametrize("kernel", [reference, triton])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_tiers_that_are_not_finite_are_marked(kernel, broken):
    layout = tiered(*TIERS[2])
    key, value = latents(2, 1, layout.k_rank), latents(2, 1, layout.v_rank, seed=1)
    key[0, 0, 10] = value[0, 0, 3] = value[1, 0, 22] = broken
    cache = torch.zeros(1, 1, 16, layout.width, dtype=torch.uint8, device=DEVICE)
    slots = torch.tensor([0, 1], device=DEVICE)
    kernel.store(key.to(DEVICE), value.to(DEVICE), cache, slots, layout)
    scales = [run.scale for side in layout.runs for run in side]
    marked = (cache[0, 0, :2, scales] == codec.NOT_FINITE).tolist()
    assert marked == [[False, True, True, False, False], [False, False, False, False, True]]
    read = layout.read(cache[0, 0, :2].cpu())
    assert read[0][0, 4:].isnan().all() and read[0][0, :4].isfinite().all()
    assert read[1][1, 20:].isnan().all() and read[1][1, :20].isfinite().all()


@pytest.mark.parametrize("store", STORES)
def test_every_rounding(store):
    """Values midway between codes, and the nearest on both sides, at a scale of one."""
    largest = torch.tensor(codec.LARGEST[store])
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    if store != "fp8_e4m3":
        numbers = torch.arange(0, largest.ceil() + 0.5, 0.5)
    midway = (numbers[1:] + numbers[:-1]) / 2
    few = torch.cat((numbers, midway, midway.nextafter(largest), midway.nextafter(-largest)))
    few = few[few <= largest]
    values = torch.cat((few, -few, largest[None]))
    values = torch.nn.functional.pad(values, (0, -len(values) % 4))
    tiers = (Tier(channels=len(values), store=store),)
    layout = tiered(tiers, tiers)
    both = values[None, None].to(DEVICE)
    cache = torch.zeros(1, 1, 16, layout.width, dtype=torch.uint8, device=DEVICE)
    triton.store(both, both, cache, torch.tensor([0], device=DEVICE), layout)
    assert same_slots(layout, cache[0, :, 0], layout.write(both, both)[0])


@pytest.mark.parametrize("store", STORES)
def test_bounds_are_the_largest_magnitudes_without_clipping(store):
    bound = bounds(torch.device("cpu"))[STORES.index(store)]
    exact = bound[: codec.NOT_FINITE - 1]
    above, below = (exact.nextafter(torch.tensor(end)) for end in (torch.inf, 0.0))
    for magnitude in (exact, above, below):
        found = (bound < magnitude[:, None]).sum(dim=-1)
        octaves = torch.log2(magnitude.double() / codec.LARGEST[store])
        byte = torch.ceil(codec.SCALE_STEPS * octaves) + codec.SCALE_ZERO
        assert torch.equal(found, byte.clamp(0, codec.NOT_FINITE - 1).long())
