"""How many K/V channels a recipe lets each attention layer cache."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from offline_compress.allocation.cache_menu import CacheStore
from vllm_svd.format import BITS, WORD_BYTES, Mode

Kept = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class LayerOverride(BaseModel):
    """What one layer does differently; ranks are taken as given, not rounded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode | None = None
    k_rank: PositiveInt | None = None
    v_rank: PositiveInt | None = None


class KVBudget(BaseModel):
    """`kept` is the fraction of the dense cache's bytes that stay; null leaves the cache dense.

    `k_kept` and `v_kept` override it for keys and values. `group` neighbouring KV heads share a
    latent. `store` is what its channels are stored as: the model's dtype, one of fewer bits, or
    `tiers` of them. Ranks, and the channels of tiers, are multiples of `rank_multiple`, at least
    one and at most all channels of the group: the nearest in the model's dtype, else the most that
    fit. The allocator `measured` spends the bytes over layers, keys and values by the KL to the
    dense model that they save.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "pre"
    kept: Kept | None = 0.5
    k_kept: Kept | None = None
    v_kept: Kept | None = None
    group: PositiveInt = 1
    store: CacheStore = "model"
    allocator: Literal["uniform", "measured"] = "uniform"
    rank_multiple: PositiveInt = 8
    layers: dict[NonNegativeInt, LayerOverride] = {}

    def mode_of(self, layer: int) -> Mode:
        """`pre` or `post` for the layer of this index."""
        override = self.layers.get(layer)
        return (override and override.mode) or self.mode

    @property
    def measures(self) -> bool:
        """Whether the model must be measured before latents have their sizes."""
        return self.kept is not None and (self.store == "tiers" or self.allocator == "measured")

    def sizes(self, head_dim: int, item_bytes: int) -> tuple[float, float]:
        """Bytes of one key and of one value latent that the shares allow."""
        dense = self.group * head_dim * item_bytes
        k_share, v_share = self._shares()
        return float((k_share or 1) * dense), float((v_share or 1) * dense)

    def ranks(self, layer: int, head_dim: int, item_bytes: int) -> tuple[int, int] | None:
        """(k_rank, v_rank) of the groups of a layer by its index; None where its cache is dense."""
        override = self.layers.get(layer, LayerOverride())
        given = (override.k_rank, override.v_rank)
        shares = self._shares()
        if not any(given) and not any(shares):
            return None
        k_rank, v_rank = (
            rank or self._rounded(share, self.group * head_dim, item_bytes)
            for rank, share in zip(given, shares, strict=True)
        )
        return k_rank, v_rank

    def problems(self, layers: int, kv_heads: int, head_dim: int) -> list[str]:
        """What this budget asks of a model that the model does not have."""
        found = []
        if kv_heads % self.group:
            found.append(f"kv.group: {self.group} does not divide the model's {kv_heads} KV heads")
        found += self._contradictions(self.group * head_dim)
        for index, override in sorted(self.layers.items()):
            where = f"kv.layers.{index}"
            if index >= layers:
                found.append(f"{where}: the model's layers are 0 to {layers - 1}")
            for name, rank in (("k_rank", override.k_rank), ("v_rank", override.v_rank)):
                if rank is not None and rank > self.group * head_dim:
                    of = f"{self.group} heads of {head_dim}" if self.group > 1 else f"{head_dim}"
                    found.append(f"{where}.{name}: {rank} exceeds the head size {of}")
        return found

    def _contradictions(self, channels: int) -> Iterator[str]:
        quantised = self.store != "model"
        if quantised and self.rank_multiple % 4:
            yield (
                f"kv.rank_multiple: {self.rank_multiple} was given; with kv.store {self.store} "
                "accepted are multiples of 4, whole bytes of codes"
            )
        if (quantised or self.measures) and self.rank_multiple > channels:
            yield (
                f"kv.rank_multiple: {self.rank_multiple} was given; a latent has {channels} "
                "channels at most"
            )
        for index, layer in sorted(self.layers.items()):
            if quantised and any((rank or 0) % 4 for rank in (layer.k_rank, layer.v_rank)):
                yield (
                    f"kv.layers.{index}: with kv.store {self.store} accepted are ranks that are "
                    "multiples of 4, whole bytes of codes"
                )
        if quantised and self.kept is None:
            yield f"kv.store: {self.store} was given, and kv.kept is null; it needs a budget"
        if self.measures and any(layer.k_rank or layer.v_rank for layer in self.layers.values()):
            yield "kv.layers: ranks were given for layers whose ranks are measured"
        if self.allocator == "measured" and (self.k_kept or self.v_kept):
            yield "kv.k_kept, kv.v_kept: the measured allocator divides kv.kept itself"
        if self.allocator == "measured" and self.kept is None:
            yield "kv.allocator: measured was given, and kv.kept is null; it needs a budget"

    def _shares(self) -> tuple[Fraction | None, Fraction | None]:
        """In decimals, as the user wrote them."""
        k_share, v_share = self.k_kept or self.kept, self.v_kept or self.kept
        return (
            None if k_share is None else Fraction(str(k_share)),
            None if v_share is None else Fraction(str(v_share)),
        )

    def _rounded(self, kept: Fraction | None, channels: int, item_bytes: int) -> int:
        step, share = self.rank_multiple, Fraction(1) if kept is None else kept
        if self.store == "model" or self.store == "tiers":
            return min(channels, step * max(1, round(share * channels / step)))
        # Two scales take a word at most, of which each side bears a half.
        bits = (share * channels * item_bytes - WORD_BYTES // 2) * 8
        fitting = int(bits // (BITS[self.store] * step))
        return step * max(1, min(fitting, channels // step))
