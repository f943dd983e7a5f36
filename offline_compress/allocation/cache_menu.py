"""What a key or value latent may become at every size, and the least that it loses there."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch

from offline_compress.linalg import relative_noise
from vllm_svd.format import Store, Tier, latent_bytes

CacheStore = Literal["model", "fp8_e4m3", "int8", "int4", "tiers"]

# Of `tiers`, in this order; channels beyond the last one are dropped.
LADDER: tuple[Store, ...] = ("int8", "int4", "int2")
# Splits into three tiers grow with the cube of the channels over the step.
_STEPS = 32


class Latent(NamedTuple):
    """Rank and tiers of one side of a cache; without tiers in the model's dtype."""

    rank: int
    tiers: tuple[Tier, ...] = ()

    def bytes(self, item_bytes: int) -> int:
        """Of one token and group."""
        return latent_bytes(self.rank, self.tiers, item_bytes)


class Offer(NamedTuple):
    """A latent, its bytes for one token and group, and the energy that is lost with it."""

    latent: Latent
    bytes: int
    lost: float


@cache
def latents(channels: int, store: CacheStore, step: int) -> tuple[Latent, ...]:
    """Every latent whose tiers are multiples of `step`, of at most `channels` channels.

    At `model` the last one is of full rank even where `step` does not divide it.
    """
    if store == "model":
        return tuple(Latent(min(rank, channels)) for rank in range(step, channels + step, step))
    if store == "tiers":
        return tuple(_ladders(channels, -(-channels // (step * _STEPS)) * step, LADDER))
    ranks = range(step, channels + 1, step)
    return tuple(Latent(rank, (Tier(channels=rank, store=store),)) for rank in ranks)


def _ladders(left: int, step: int, stores: Sequence[Store]) -> Iterator[Latent]:
    if not stores:
        return
    for width in range(0, left + 1, step):
        mine = (Tier(channels=width, store=stores[0]),) if width else ()
        if mine:
            yield Latent(width, mine)
        for rest in _ladders(left - width, step, stores[1:]):
            yield Latent(width + rest.rank, mine + rest.tiers)


def menu(energies: torch.Tensor, store: CacheStore, step: int, item_bytes: int) -> list[Offer]:
    """The best offers, ascending in bytes, each losing less than all smaller ones.

    `energies` [channels], strongest first.
    """
    sums = _sums(energies)
    best: dict[int, Offer] = {}
    for latent in latents(len(energies), store, step):
        lost = _lost(sums, latent)
        size = latent.bytes(item_bytes)
        if size not in best or lost < best[size].lost:
            best[size] = Offer(latent, size, lost)
    front: list[Offer] = []
    for size in sorted(best):
        if not front or best[size].lost < front[-1].lost:
            front.append(best[size])
    return front


def lost_energy(energies: torch.Tensor, rank: int, tiers: Sequence[Tier] = ()) -> float:
    """Of `energies` [channels]: those beyond the rank, and the noise of storing each tier."""
    return _lost(_sums(energies), Latent(rank, tuple(tiers)))


class _Sums(NamedTuple):
    """Of the first 0, 1, ... channels: their energies, and the square roots of them."""

    energies: list[float]
    roots: list[float]


def _sums(energies: torch.Tensor) -> _Sums:
    exact = energies.double()
    return _Sums(*([0.0, *terms.cumsum(0).tolist()] for terms in (exact, exact.sqrt())))


def _lost(sums: _Sums, latent: Latent) -> float:
    """Channels share the noise of their tier as kv.basis.solve_tiers weights them.

    Of energies that were summed over groups or layers it is a bound: each of these has weights of
    its own, and loses less where they fall off differently (a tenth to a fifth, if very).
    """
    lost, first = sums.energies[-1] - sums.energies[latent.rank], 0
    for tier in latent.tiers:
        behind = first + tier.channels
        level = (sums.roots[behind] - sums.roots[first]) / tier.channels
        lost += relative_noise(tier.store, tier.channels) * tier.channels * level**2
        first = behind
    return lost


def largest_within(offers: Sequence[Offer], size: float) -> Offer:
    """The best offer of at most `size` bytes, or the smallest."""
    fitting = [offer for offer in offers if offer.bytes <= size]
    return fitting[-1] if fitting else offers[0]
