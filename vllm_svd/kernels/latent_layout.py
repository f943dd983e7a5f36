"""What one slot of the paged cache holds: the latents of one token and group."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
import torch

from vllm_svd import codec
from vllm_svd.format import STORES, KVProjection, Tier, in_words, slot_bytes


@dataclass(frozen=True)
class Run:
    """Channels of one tier: where their codes and their scale lie in a slot, in bytes."""

    channel: int
    tier: Tier
    codes: int
    scale: int

    @property
    def code_slice(self) -> slice:
        """The bytes of the codes."""
        return slice(self.codes, self.codes + self.tier.code_bytes)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """For machine code: store, first channel, channels, byte of the codes, of the scale."""
        tier = self.tier
        return STORES.index(tier.store), self.channel, tier.channels, self.codes, self.scale


@dataclass(frozen=True, eq=False)
class LatentLayout:
    """A slot is [z_k | z_v] in the cache's dtype; with tiers it is bytes:

    codes of the key's tiers, then those of the value's, each tier from a word on; one scale per
    tier, in the same order, in the bytes that codes leave, and then behind them. Bytes that are
    left may be anything.
    Each layer has its own: kernels keep in `memo`, by their name, what they derive for it.
    """

    k_rank: int
    v_rank: int
    k_tiers: tuple[Tier, ...] = ()
    v_tiers: tuple[Tier, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, projection: KVProjection) -> "LatentLayout":
        return cls(projection.k_rank, projection.v_rank, projection.k_tiers, projection.v_tiers)

    @property
    def quantised(self) -> bool:
        return bool(self.k_tiers)

    @property
    def width(self) -> int:
        """Entries of a slot, of the cache's dtype or bytes."""
        if not self.quantised:
            return self.k_rank + self.v_rank
        return slot_bytes((*self.k_tiers, *self.v_tiers))

    @functools.cached_property
    def runs(self) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The tiers of the key, then those of the value; none where latents are not quantised."""
        found = tuple(self._runs())
        return found[: len(self.k_tiers)], found[len(self.k_tiers) :]

    @functools.cached_property
    def run_numbers(self) -> tuple[Any, Any]:
        """Run.numbers of the key's tiers and of the value's, int64 [tiers, 5]."""
        keys, values = (
            np.array([run.numbers for run in part], dtype=np.int64) for part in self.runs
        )
        return keys, values

    def read(
        self, slots: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value latents [..., k_rank], [..., v_rank] of slots [..., width]."""
        if not self.quantised:
            latents = slots.to(dtype)
            return latents[..., : self.k_rank], latents[..., self.k_rank :]
        keys, values = (
            codec.decode(
                torch.cat([slots[..., run.code_slice] for run in runs], dim=-1),
                slots[..., [run.scale for run in runs]],
                [run.tier for run in runs],
                dtype,
            )
            for runs in self.runs
        )
        return keys, values

    def write(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Slots [..., width] that hold latents [..., k_rank] and [..., v_rank]."""
        if not self.quantised:
            return torch.cat((key, value), dim=-1)
        slots = key.new_zeros(*key.shape[:-1], self.width, dtype=torch.uint8)
        for latent, runs in zip((key, value), self.runs, strict=True):
            tiers = [run.tier for run in runs]
            codes, scales = codec.encode(latent, tiers)
            parts = torch.split(codes, [tier.code_bytes for tier in tiers], dim=-1)
            for run, part, scale in zip(runs, parts, scales.unbind(-1), strict=True):
                slots[..., run.code_slice] = part
                slots[..., run.scale] = scale
        return slots

    def _runs(self) -> Iterator[Run]:
        behind = 0
        left: list[int] = []
        places: list[tuple[int, Tier, int]] = []
        for tiers in (self.k_tiers, self.v_tiers):
            channel = 0
            for tier in tiers:
                places.append((channel, tier, behind))
                end = behind + tier.code_bytes
                behind = in_words(end)
                left += range(end, behind)
                channel += tier.channels
        for place, scale in zip(places, chain(left, count(behind)), strict=False):
            yield Run(*place, scale)
