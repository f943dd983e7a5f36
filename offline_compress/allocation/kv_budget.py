"""How many K/V channels a recipe lets each attention layer cache."""

from fractions import Fraction
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from vllm_svd.format import Mode

Kept = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class LayerOverride(BaseModel):
    """What one layer does differently; ranks are taken as given, not rounded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode | None = None
    k_rank: PositiveInt | None = None
    v_rank: PositiveInt | None = None


class KVBudget(BaseModel):
    """`kept` is the fraction of K/V channels that stay; null leaves the cache dense.

    `k_kept` and `v_kept` override it for keys and values. `group` neighbouring KV heads share a
    latent, whose ranks are rounded to the nearest multiple of `rank_multiple`, at least one and at
    most all channels of the group.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "pre"
    kept: Kept | None = 0.5
    k_kept: Kept | None = None
    v_kept: Kept | None = None
    group: PositiveInt = 1
    rank_multiple: PositiveInt = 8
    layers: dict[NonNegativeInt, LayerOverride] = {}

    def mode_of(self, layer: int) -> Mode:
        """`pre` or `post` for the layer of this index."""
        override = self.layers.get(layer)
        return (override and override.mode) or self.mode

    def ranks(self, layer: int, head_dim: int) -> tuple[int, int] | None:
        """(k_rank, v_rank) of the groups of a layer by its index; None where its cache is dense."""
        override = self.layers.get(layer, LayerOverride())
        given = (override.k_rank, override.v_rank)
        shares = (self.k_kept or self.kept, self.v_kept or self.kept)
        if not any(given) and not any(shares):
            return None
        k_rank, v_rank = (
            rank or self._rounded(share, self.group * head_dim)
            for rank, share in zip(given, shares, strict=True)
        )
        return k_rank, v_rank

    def problems(self, layers: int, kv_heads: int, head_dim: int) -> list[str]:
        """What this budget asks of a model that the model does not have."""
        found = []
        if kv_heads % self.group:
            found.append(f"kv.group: {self.group} does not divide the model's {kv_heads} KV heads")
        for index, override in sorted(self.layers.items()):
            where = f"kv.layers.{index}"
            if index >= layers:
                found.append(f"{where}: the model's layers are 0 to {layers - 1}")
            for name, rank in (("k_rank", override.k_rank), ("v_rank", override.v_rank)):
                if rank is not None and rank > self.group * head_dim:
                    of = f"{self.group} heads of {head_dim}" if self.group > 1 else f"{head_dim}"
                    found.append(f"{where}.{name}: {rank} exceeds the head size {of}")
        return found

    def _rounded(self, kept: float | None, channels: int) -> int:
        if kept is None:
            return channels
        multiples = round(Fraction(str(kept)) * channels / self.rank_multiple)
        return min(channels, self.rank_multiple * max(1, multiples))
