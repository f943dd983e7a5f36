"""What one slot of the paged cache holds: the latents of one token and group."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_svd import codec
from vllm_svd.format import STORES, KVProjection, Tier


@dataclass(frozen=True)
class Run:
    """Channels of one tier: where their codes and their scale lie in a slot, in bytes."""

    channel: int
    tier: Tier
    codes: int
    scale: int

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """For machine code: store, first channel, channels, byte of the codes, of the scale."""
        tier = self.tier
        return STORES.index(tier.store), self.channel, tier.channels, self.codes, self.scale


@dataclass(frozen=True, eq=False)
class LatentLayout:
    """A slot is [z_k | z_v] in the cache's dtype; with tiers it is bytes:

    [codes of the key's tiers | those of the value's | one scale per tier, in the same order].
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
        return sum(tier.bytes for tier in (*self.k_tiers, *self.v_tiers))

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
        k_codes, v_codes, k_scales, v_scales = torch.split(
            slots,
            [
                sum(tier.code_bytes for tier in self.k_tiers),
                sum(tier.code_bytes for tier in self.v_tiers),
                len(self.k_tiers),
                len(self.v_tiers),
            ],
            dim=-1,
        )
        return (
            codec.decode(k_codes, k_scales, self.k_tiers, dtype),
            codec.decode(v_codes, v_scales, self.v_tiers, dtype),
        )

    def write(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Slots [..., width] that hold latents [..., k_rank] and [..., v_rank]."""
        if not self.quantised:
            return torch.cat((key, value), dim=-1)
        k_codes, k_scales = codec.encode(key, self.k_tiers)
        v_codes, v_scales = codec.encode(value, self.v_tiers)
        return torch.cat((k_codes, v_codes, k_scales, v_scales), dim=-1)

    def _runs(self) -> Iterator[Run]:
        codes, scale = 0, sum(tier.code_bytes for tier in (*self.k_tiers, *self.v_tiers))
        for tiers in (self.k_tiers, self.v_tiers):
            channel = 0
            for tier in tiers:
                yield Run(channel, tier, codes, scale)
                channel, codes, scale = channel + tier.channels, codes + tier.code_bytes, scale + 1
