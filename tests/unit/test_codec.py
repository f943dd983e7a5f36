"""Codes of stored latents: their errors, their scales, how they are packed, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_svd import codec
from vllm_svd.format import STORES, KVProjection, Tier, slot_bytes
from vllm_svd.kernels.latent_layout import LatentLayout

FEW_BITS = [store for store in STORES if codec.TRIED[store] > 1]
# Relative roundings of fp32 in quotients and products.
ROUNDING = 1e-6


def one(store: str, channels: int = 32) -> tuple[Tier, ...]:
    return (Tier(channels=channels, store=store),)


def latents(tokens: int = 200, channels: int = 32, seed: int = 0) -> torch.Tensor:
    """Random latents whose magnitudes differ from token to token, some with outliers."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, channels, generator=g)
    z[::3, 0] *= 6
    return z * 2 ** (12 * torch.rand(tokens, 1, generator=g) - 6)


def squared_error(z: torch.Tensor, tiers: tuple[Tier, ...]) -> torch.Tensor:
    return (codec.stored(z, tiers) - z).square().sum(dim=-1)


def unclipped_byte(z: torch.Tensor, store: str) -> torch.Tensor:
    """The first scale that clips nothing, counted up from the smallest."""
    reach = codec.LARGEST[store] * codec.scale_of(torch.arange(255), torch.float64)
    return (reach < z.abs().amax(dim=-1, keepdim=True).double()).sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("store", STORES)
def test_what_codes_express_is_stored_unchanged(store):
    """At scales of a power of two; at others the product of scale and code is rounded."""
    codes = torch.randint(0, 256, (50, 32), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.uint8)[:, : one(store)[0].code_bytes]
    largest = codec.encode(torch.full((1, 32), codec.LARGEST[store]), one(store))[0]
    codes[:, 0] = largest[0, 0]
    if store == "fp8_e4m3":
        codes[(codes & 127) == 127] = 0  # NaN
    if store == "int8":
        codes[codes == 128] = 0  # -128 is not a code
    scales = torch.arange(50).mul(8).remainder(256)[:, None].to(torch.uint8)
    z = codec.decode(codes, scales, one(store))
    again, found = codec.encode(z, one(store))
    assert torch.equal(found, scales)
    assert torch.equal(codec.decode(again, found, one(store)), z)


@pytest.mark.parametrize("store", STORES)
def test_storing_twice_adds_at_most_half_a_step(store):
    """Rounding may lower the largest magnitude, and with it the scale."""
    once = codec.stored(latents(), one(store))
    twice = codec.stored(once, one(store))
    scale = codec.scale_of(unclipped_byte(once, store))
    step = torch.maximum(scale, once.abs() / 8) if store == "fp8_e4m3" else scale
    assert bool(((twice - once).norm(dim=-1) <= (step / 2).expand_as(once).norm(dim=-1)).all())


@pytest.mark.parametrize("store", ["int8", "fp8_e4m3"])
def test_eight_bits_clip_nothing_at_the_smallest_scale(store):
    z = latents()
    scales = codec.encode(z, one(store))[1]
    assert torch.equal(scales.long(), unclipped_byte(z, store))
    # Half the distance between neighbouring codes: of fp8 it is a sixteenth of the value's octave.
    half = codec.scale_of(scales).expand_as(z) / 2
    if store == "fp8_e4m3":
        half = torch.maximum(half / 2**9, z.abs() / 16)
    error = (codec.stored(z, one(store)) - z).abs()
    assert bool((error <= half * (1 + ROUNDING) + z.abs() * ROUNDING).all())


@pytest.mark.parametrize("store", FEW_BITS)
def test_few_bits_take_the_best_scale(store):
    z = latents()
    codes, scales = codec.encode(z, one(store))
    unclipped, largest = unclipped_byte(z, store), codec.LARGEST[store]
    lower = unclipped - scales.long()
    assert bool((lower >= 0).all()) and bool((lower < codec.TRIED[store]).all())
    assert bool((lower > 0).any())
    errors = []
    for less in range(codec.TRIED[store]):
        scale = codec.scale_of(unclipped - less)
        read = ((z / scale).floor() + 0.5).clamp(-largest, largest) * scale
        errors.append((read - z).square().sum(dim=-1))
    error = squared_error(z, one(store))
    assert torch.allclose(error, torch.stack(errors).amin(dim=0), rtol=1e-5)
    assert bool((error <= errors[0] * (1 + ROUNDING)).all())
    assert codes.shape[-1] == 32 * one(store)[0].bits // 8


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("octaves", [-1, 1, 5])
def test_a_power_of_two_moves_only_the_scale(store, octaves):
    z = latents()
    codes, scales = codec.encode(z, one(store))
    moved, other = codec.encode(z * 2.0**octaves, one(store))
    assert torch.equal(moved, codes)
    assert torch.equal(other.int(), scales.int() + codec.SCALE_STEPS * octaves)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_latent_that_is_not_finite_is_read_as_nan(store, broken):
    tiers = (Tier(channels=8, store=store), Tier(channels=8, store="int2"))
    z = latents(3, 16)
    z[1, 5] = broken
    scales = codec.encode(z, tiers)[1]
    assert (scales == codec.NOT_FINITE).tolist() == [[False] * 2, [True, False], [False] * 2]
    read = codec.stored(z, tiers)
    assert read[1, :8].isnan().all()
    assert read[[0, 2]].isfinite().all() and read[1, 8:].isfinite().all()


@pytest.mark.parametrize("store", STORES)
def test_zero_stays_small_and_large_latents_are_clipped(store):
    assert codec.stored(torch.zeros(1, 32), one(store)).abs().max() <= 2.0**-12
    huge = codec.encode(torch.full((1, 32), 1e30), one(store))[1]
    assert int(huge) == codec.NOT_FINITE - 1
    assert codec.stored(torch.full((1, 32), 1e30), one(store)).isfinite().all()


def test_scales_are_eighths_of_octaves():
    scales = codec.scale_of(torch.arange(256))
    assert float(scales[128]) == 1 and float(scales[136]) == 2 and float(scales[0]) == 2.0**-16
    assert torch.allclose(scales[1:255] / scales[:254], torch.tensor(2 ** (1 / 8)))
    assert scales[255].isnan()


def test_packing():
    """Byte j holds channels j and w / 2 + j (4 bits), or every w / 4-th from j on (2 bits)."""
    nibbles = torch.tensor([15, 1, 2, 3, 4, 5, 6, 0])
    codes, scales = codec.encode((nibbles - 7.5)[None], one("int4", 8))
    assert codes[0].tolist() == [15 | 4 << 4, 1 | 5 << 4, 2 | 6 << 4, 3 | 0 << 4]
    assert scales.tolist() == [[128]]
    crumbs = torch.tensor([3, 0, 1, 0, 3, 2, 0, 3])
    codes, scales = codec.encode((crumbs - 1.5)[None], one("int2", 8))
    assert codes[0].tolist() == [3 | 1 << 2 | 3 << 4 | 0 << 6, 0 | 0 << 2 | 2 << 4 | 3 << 6]
    assert scales.tolist() == [[128]]
    codes, _ = codec.encode(torch.tensor([[127.0, -127.0, 0.0, -1.0]]), one("int8", 4))
    assert codes[0].tolist() == [127, 129, 0, 255]


def test_tiers_are_stored_each_by_itself():
    tiers = (*one("int8", 16), *one("int4", 12), *one("int2", 4))
    z = latents(5)
    codes, scales = codec.encode(z, tiers)
    assert codes.shape == (5, 16 + 6 + 1) and scales.shape == (5, 3)
    alone = [
        codec.stored(part, (tier,))
        for part, tier in zip(z.split([16, 12, 4], dim=-1), tiers, strict=True)
    ]
    assert torch.equal(codec.stored(z, tiers), torch.cat(alone, dim=-1))
    assert codec.stored(z, ()) is z
    assert codec.stored(z.bfloat16(), tiers).dtype == torch.bfloat16


def test_a_slot_is_codes_from_words_on_and_scales_in_what_they_leave():
    k_tiers, v_tiers = (*one("int8", 4), *one("int4", 12)), one("int2", 16)
    layout = LatentLayout(16, 16, k_tiers, v_tiers)
    key, value = latents(7, 16), latents(7, 16, seed=1)
    slots = layout.write(key, value)
    assert slots.shape == (7, layout.width) and layout.width == 4 + (6 + 2) + 4 + (1 + 3)
    keys, values = layout.runs
    assert [(run.channel, run.codes, run.scale) for run in keys] == [(0, 0, 10), (4, 4, 11)]
    assert [(run.channel, run.codes, run.scale) for run in values] == [(0, 12, 16)]
    assert torch.equal(slots[:, 10:12], codec.encode(key, k_tiers)[1])
    assert torch.equal(slots[:, 12:16], codec.encode(value, v_tiers)[0])
    read = layout.read(slots)
    assert torch.equal(read[0], codec.stored(key, k_tiers))
    assert torch.equal(read[1], codec.stored(value, v_tiers))


@given(sizes=st.lists(st.integers(1, 9).map(lambda n: 4 * n), min_size=2, max_size=6))
def test_slots_of_whole_words_are_as_large_as_they_must_be(sizes):
    """Codes of eight channels' multiples leave scales their place: beginning with words is free."""
    tiers = [Tier(channels=2 * n, store=store) for n, store in zip(sizes, 3 * STORES, strict=False)]
    size = sum(tier.bytes for tier in tiers)
    assert slot_bytes(tiers) % 4 == 0 and size <= slot_bytes(tiers)
    twos = [tier for tier in tiers if tier.code_bytes % 4]
    if 2 * len(twos) <= len(tiers):
        assert slot_bytes(tiers) < size + 4


def test_tiers_that_are_refused():
    with pytest.raises(ValidationError, match="multiple of 4"):
        Tier(channels=6, store="int8")
    with pytest.raises(ValidationError, match="greater than 0"):
        Tier(channels=0, store="int8")
    with pytest.raises(ValidationError):
        Tier(channels=8, store="int3")
    shape = {"mode": "pre", "num_kv_heads": 2, "head_dim": 32, "k_rank": 16, "v_rank": 8}
    fits = {"k_tiers": (*one("int8", 8), *one("int4", 8)), "v_tiers": one("int4", 8)}
    projection = KVProjection(**shape, **fits)
    assert projection.slot_shares(2) == (8 + 1 + 4 + 1, 4 + 1 + 1)
    assert projection.bytes_per_token(2) == 2 * 20
    assert LatentLayout.of(projection).width == 20
    for wrong, message in (
        ({"k_tiers": ()}, "given together"),
        ({"v_tiers": ()}, "given together"),
        ({"k_tiers": one("int8", 8)}, "add up to k_rank 16"),
        ({"v_tiers": one("int8", 12)}, "add up to v_rank 8"),
        ({"k_tiers": (*one("int4", 8), *one("int8", 8))}, "fewer bits"),
        ({"k_tiers": (*one("int8", 8), *one("fp8_e4m3", 8))}, "fewer bits"),
    ):
        with pytest.raises(ValidationError, match=message):
            KVProjection(**shape, **(fits | wrong))
