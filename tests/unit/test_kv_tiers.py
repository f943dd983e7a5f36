"""Bases of latents in few bits: what rotation, scale and regression promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kv_bases import psd, seeds, spectrum

from offline_compress.allocation import lost_energy
from offline_compress.kv import KVStatistics, channel_energies, kv_error, project, rotation
from offline_compress.kv.basis import energies, solve_tiers, weighted_error
from offline_compress.linalg import relative_noise
from vllm_svd.codec import stored
from vllm_svd.format import STORES, KVProjection, Tier

TIERS = (Tier(channels=4, store="int8"), Tier(channels=8, store="int4"))
SIZE = 16


def of(tiers, matrix):
    """The diagonal blocks of a matrix that belong to each tier."""
    first, blocks = 0, []
    for tier in tiers:
        mine = slice(first, first + tier.channels)
        blocks.append(matrix[mine, mine])
        first += tier.channels
    return blocks


@given(channels=st.integers(1, 32).map(lambda n: 4 * n))
def test_rotations_are_orthogonal_and_level_energies(channels):
    turned = rotation(channels)
    identity = torch.eye(channels, dtype=torch.float64)
    assert torch.allclose(turned @ turned.mT, identity, atol=1e-12)
    falling = torch.logspace(0, -3, channels, 10, dtype=torch.float64)
    levelled = (turned @ falling.diag() @ turned.mT).diagonal()
    if channels & (channels - 1) == 0:
        assert torch.allclose(levelled, falling.mean().expand(channels), rtol=1e-9)
    else:  # within a factor of two of the mean, where the energies spread over a thousand
        assert levelled.max() < 2 * falling.mean()


def level(part):
    """Of a tier whose channels have these energies: what the noise of each costs."""
    return float(part.sqrt().mean() ** 2)


@given(seed=seeds)
def test_a_latent_has_unit_energy_and_its_noise_one_price_within_a_tier(seed):
    metric, second_moment = psd(seed, SIZE), psd(seed + 1, SIZE)
    up, down = solve_tiers(metric, second_moment, TIERS)
    for held in of(TIERS, down @ second_moment @ down.mT):
        assert torch.allclose(held.diagonal(), torch.ones(len(held), dtype=torch.float64))
    values = spectrum(metric, second_moment)
    first = 0
    for tier, price in zip(TIERS, of(TIERS, up.mT @ metric @ up), strict=True):
        expected = level(values[first : first + tier.channels])
        prices = price.diagonal()
        level_prices = torch.full_like(prices, expected)
        assert torch.allclose(prices, level_prices, rtol=1e-6, atol=1e-6 * expected)
        first += tier.channels


@given(seed=seeds)
def test_no_other_coordinates_of_a_latent_have_less_noise(seed):
    """A step either way: whatever is mixed within a tier, the noise has one scale."""
    metric, second_moment = psd(seed, SIZE), psd(seed + 1, SIZE)
    up, down = solve_tiers(metric, second_moment, TIERS)
    best = weighted_error(metric, second_moment, up, down, TIERS)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    step = torch.block_diag(*of(TIERS, step))
    for size in (-0.01, 0.01):
        mixed = torch.eye(12, dtype=torch.float64) + size * step
        other = up @ torch.linalg.inv(mixed), mixed @ down
        assert best <= weighted_error(metric, second_moment, *other, TIERS) * (1 + 1e-9)


@given(seed=seeds)
def test_without_noise_the_loss_is_that_of_truncation(seed):
    metric, second_moment = psd(seed, SIZE), psd(seed + 1, SIZE)
    values = spectrum(metric, second_moment)
    assert torch.allclose(energies(metric, second_moment), values, rtol=1e-6)
    lost = weighted_error(metric, second_moment, *solve_tiers(metric, second_moment, TIERS))
    assert lost == pytest.approx(float(values[12:].sum() / values.sum()), rel=1e-6)


@given(seed=seeds)
def test_rounding_the_basis_costs_next_to_nothing(seed):
    """`up` regresses on what `down` became: a full-rank latent still rebuilds everything."""
    metric, second_moment = psd(seed, SIZE), psd(seed + 1, SIZE)
    whole = (Tier(channels=SIZE, store="int8"),)
    up, down = solve_tiers(metric, second_moment, whole, torch.bfloat16)
    assert torch.equal(down, down.bfloat16().double())
    assert weighted_error(metric, second_moment, up, down) < 1e-9
    exact_up, _ = solve_tiers(metric, second_moment, whole)
    assert weighted_error(metric, second_moment, exact_up, down) > 1e-7


def test_the_predicted_error_is_that_of_stored_latents():
    """Normally distributed keys with the moments that the bases were made for."""
    metric, second_moment = psd(1, SIZE), psd(2, SIZE)
    up, down = solve_tiers(metric, second_moment, TIERS)
    generator = torch.Generator().manual_seed(3)
    factor = torch.linalg.cholesky(second_moment)
    keys = torch.randn(20000, SIZE, generator=generator, dtype=torch.float64) @ factor.mT
    error = stored((keys @ down.mT).float(), TIERS).double() @ up.mT - keys
    measured = torch.sum((error @ metric) * error) / torch.sum((keys @ metric) * keys)
    predicted = weighted_error(metric, second_moment, up, down, TIERS)
    assert float(measured) == pytest.approx(predicted, rel=0.1)
    assert predicted > 1.2 * weighted_error(metric, second_moment, up, down)


def test_fewer_bits_have_more_noise_at_every_width():
    for channels in (4, 8, 32, 128):
        noise = [relative_noise(store, channels) for store in ("int8", "fp8_e4m3", "int4", "int2")]
        assert noise == sorted(noise)
        assert noise[0] < 1e-4 and 0.01 < noise[-1] < 0.15
    assert {relative_noise(store, 37) for store in STORES} == {
        relative_noise(store, 32) for store in STORES
    }


def statistics(groups=2, size=SIZE):
    moments = [torch.stack([psd(10 * i + g, size) for g in range(groups)]) for i in range(4)]
    return KVStatistics("pre", moments[0], moments[1], moments[2], moments[3], 100)


def test_a_layer_in_tiers():
    found = statistics()
    config = KVProjection(
        mode="pre",
        num_kv_heads=4,
        head_dim=8,
        group=2,
        k_rank=12,
        v_rank=4,
        k_tiers=TIERS,
        v_tiers=TIERS[:1],
    )
    bases = project(found, config, torch.bfloat16)
    assert bases.k_down.shape == (2, 12, 16) and bases.v_up.shape == (4, 8, 4)
    k_error, v_error = kv_error(found, bases)
    key, value = channel_energies(found)
    assert key.shape == (2, 16) and bool((key[:, :-1] >= key[:, 1:]).all())
    noise = sum(
        relative_noise(tier.store, tier.channels) * tier.channels * level(part)
        for spectrum in key
        for tier, part in zip(TIERS, (spectrum[:4], spectrum[4:12]), strict=True)
    )
    lost = noise + float(key[:, 12:].sum())
    assert lost_energy(key, 12, TIERS) == pytest.approx(lost)
    assert k_error == pytest.approx(lost / float(key.sum()), rel=0.02)
    assert v_error == pytest.approx(float(value[:, 4:].sum() / value.sum()), rel=0.02)


def test_a_head_that_nothing_reads_has_no_energy_to_pay_for():
    assert not energies(torch.zeros(SIZE, SIZE), psd(1, SIZE)).any()
    up, down = solve_tiers(torch.zeros(SIZE, SIZE), psd(1, SIZE), TIERS)
    assert up.isfinite().all() and down.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", [3, 5, 9])
def test_tiers_beyond_the_rank_of_what_they_hold(dtype, rank):
    """Behind a compressed projection keys may have fewer dimensions than were planned for."""
    metric, second_moment = psd(1, SIZE), psd(2, SIZE, rank)
    up, down = solve_tiers(metric, second_moment, TIERS, dtype)
    assert down.to(dtype).isfinite().all() and up.to(dtype).isfinite().all()
    dropped = spectrum(metric, second_moment).clamp_min(0)[12:].sum()
    assert weighted_error(metric, second_moment, up, down) < float(dropped) + 1e-5
