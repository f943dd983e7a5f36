"""What a key, a value, or a slot of both may become at every size, and the least it loses there."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812

from offline_compress.linalg import relative_noise
from vllm_svd.format import Store, Tier, latent_bytes, slot_bytes

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


class Slot(NamedTuple):
    """Both latents of a token and group, their bytes with what fills them up, and what is lost."""

    key: Latent
    value: Latent
    bytes: int
    lost: float


Choice = TypeVar("Choice", Offer, Slot)


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

    `energies` [channels], strongest first, or [latents, channels] of groups and layers that are all
    cut alike.
    """
    losses = _Losses(energies)
    best: dict[int, Offer] = {}
    for latent in latents(energies.shape[-1], store, step):
        lost = losses.of(latent)
        size = latent.bytes(item_bytes)
        if size not in best or lost < best[size].lost:
            best[size] = Offer(latent, size, lost)
    return _front(best)


def lost_energy(energies: torch.Tensor, rank: int, tiers: Sequence[Tier] = ()) -> float:
    """Of `energies` as for a menu: those beyond the rank, and the noise of storing each tier."""
    return _Losses(energies).of(Latent(rank, tuple(tiers)))


class _Losses:
    """What latents lose, from sums over the first 0, 1, ... channels.

    Channels share the noise of their tier as kv.basis.solve_tiers weights them: it is that of the
    mean root of their energies, of every group and layer by itself.
    """

    def __init__(self, energies: torch.Tensor) -> None:
        exact = energies.double().view(-1, energies.shape[-1])
        self._kept: list[float] = [0.0, *exact.sum(0).cumsum(0).tolist()]
        self._roots = F.pad(exact.sqrt().cumsum(1), (1, 0))
        self._squares: dict[tuple[int, int], float] = {}

    def of(self, latent: Latent) -> float:
        """Energy, over all groups and layers."""
        lost, first = self._kept[-1] - self._kept[latent.rank], 0
        for tier in latent.tiers:
            behind = first + tier.channels
            noise = relative_noise(tier.store, tier.channels)
            lost += noise / tier.channels * self._square(first, behind)
            first = behind
        return lost

    def _square(self, first: int, behind: int) -> float:
        """Of the sum of the roots of a run of channels; tiers begin and end at few places."""
        if (first, behind) not in self._squares:
            sums = self._roots[:, behind] - self._roots[:, first]
            self._squares[first, behind] = float(sums.square().sum())
        return self._squares[first, behind]


def slots(keys: Sequence[Offer], values: Sequence[Offer]) -> list[Slot]:
    """A menu of both: at every size the best of all pairs."""
    best: dict[int, Slot] = {}
    for key in keys:
        for value in values:
            size, lost = key.bytes + value.bytes, key.lost + value.lost
            if key.latent.tiers:
                size = slot_bytes((*key.latent.tiers, *value.latent.tiers))
            if size not in best or lost < best[size].lost:
                best[size] = Slot(key.latent, value.latent, size, lost)
    return _front(best)


def _front(best: Mapping[int, Choice]) -> list[Choice]:
    """Those of each size that lose less than all smaller ones, ascending."""
    front: list[Choice] = []
    for size in sorted(best):
        if not front or best[size].lost < front[-1].lost:
            front.append(best[size])
    return front


def largest_within(offers: Sequence[Choice], size: float) -> Choice:
    """The best of at most `size` bytes, or the smallest."""
    fitting = [offer for offer in offers if offer.bytes <= size]
    return fitting[-1] if fitting else offers[0]
