"""K/V channel projections of an attention layer, and how its latents are stored on the page."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from vllm_svd.format.linear import Stored

Mode = Literal["pre", "post"]
Side = Literal["key", "value"]
Store = Literal["fp8_e4m3", "int8", "int4", "int2"]

BITS: dict[Store, int] = {"fp8_e4m3": 8, "int8": 8, "int4": 4, "int2": 2}
STORES: tuple[Store, ...] = get_args(Store)
SCALE_BYTES = 1
WORD_BYTES = 4  # GPUs read words, and copy ahead only these


class Tier(BaseModel):
    """Neighbouring channels of a latent whose codes have one scale per token and group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[int, Field(gt=0, multiple_of=4)]  # two bits each: whole bytes
    store: Store

    @property
    def bits(self) -> int:
        """Of one code."""
        return BITS[self.store]

    @property
    def code_bytes(self) -> int:
        """Of one token and group, without the scale."""
        return self.channels * self.bits // 8

    @property
    def bytes(self) -> int:
        """Of one token and group."""
        return self.code_bytes + SCALE_BYTES


def latent_bytes(rank: int, tiers: Sequence[Tier], item_bytes: int) -> int:
    """Of one token and group: in tiers, or in the model's dtype, which takes `item_bytes`."""
    return sum(tier.bytes for tier in tiers) if tiers else rank * item_bytes


def in_words(size: int) -> int:
    """Bytes of the words that `size` bytes take."""
    return -(-size // WORD_BYTES) * WORD_BYTES


def slot_bytes(tiers: Sequence[Tier]) -> int:
    """Of one token and group, all tiers of key and value: whole words.

    Codes of each tier begin with one; scales lie in what these leave, and then behind them.
    """
    codes = [tier.code_bytes for tier in tiers]
    whole = sum(map(in_words, codes))
    left = whole - sum(codes)
    return whole + in_words(max(0, len(tiers) * SCALE_BYTES - left))


class KVProjection(BaseModel):
    """K/V channel projections of one attention layer.

    `group` neighbouring KV heads share one latent of their keys and one of their values.

    `pre`: the key is projected before RoPE and rebuilt, then rotated, at attention time.
    `post`: rotated keys and queries are projected; attention runs in k_rank channels.
    The value is projected in both; the attention output is expanded.

    Without tiers the cache holds latents in the model's dtype. `k_tiers` and `v_tiers` cut both
    into runs of channels, each stored in fewer bits than the one before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    k_rank: PositiveInt
    v_rank: PositiveInt
    group: PositiveInt = 1
    k_tiers: tuple[Tier, ...] = ()
    v_tiers: tuple[Tier, ...] = ()

    @model_validator(mode="after")
    def _within_heads(self) -> "KVProjection":
        if self.num_kv_heads % self.group:
            raise ValueError(f"group {self.group} does not divide the {self.num_kv_heads} KV heads")
        largest = self.group * self.head_dim
        for name, rank in (("k_rank", self.k_rank), ("v_rank", self.v_rank)):
            if rank > largest:
                raise ValueError(f"{name} {rank} exceeds the head size; the largest is {largest}")
        return self

    @model_validator(mode="after")
    def _tiers_are_the_latent(self) -> "KVProjection":
        if bool(self.k_tiers) != bool(self.v_tiers):
            raise ValueError("k_tiers and v_tiers are given together, or neither")
        for name, rank, tiers in (
            ("k", self.k_rank, self.k_tiers),
            ("v", self.v_rank, self.v_tiers),
        ):
            if not tiers:
                continue
            if sum(tier.channels for tier in tiers) != rank:
                raise ValueError(f"the channels of {name}_tiers must add up to {name}_rank {rank}")
            bits = [tier.bits for tier in tiers]
            if any(after >= before for before, after in pairwise(bits)):
                raise ValueError(f"{name}_tiers must have fewer bits from one to the next")
        return self

    @property
    def groups(self) -> int:
        """Latents of one token, for keys as for values."""
        return self.num_kv_heads // self.group

    def latent(self, side: Side) -> tuple[int, tuple[Tier, ...]]:
        """Rank and tiers of keys or of values."""
        return (self.k_rank, self.k_tiers) if side == "key" else (self.v_rank, self.v_tiers)

    def label(self, side: Side) -> str:
        """A latent in a few words, for tables: `rank 32`, or `8 int8 + 40 int4`."""
        rank, tiers = self.latent(side)
        return " + ".join(f"{tier.channels} {tier.store}" for tier in tiers) or f"rank {rank}"

    def slot_shares(self, item_bytes: int) -> tuple[int, int]:
        """Bytes of a slot: the key latent's, and the value's with what fills the slot up.

        The model's dtype takes `item_bytes`.
        """
        key = latent_bytes(self.k_rank, self.k_tiers, item_bytes)
        if self.k_tiers:
            return key, slot_bytes((*self.k_tiers, *self.v_tiers)) - key
        return key, latent_bytes(self.v_rank, self.v_tiers, item_bytes)

    def bytes_per_token(self, item_bytes: int) -> int:
        """Cached bytes of this layer for one token, over all groups."""
        return self.groups * sum(self.slot_shares(item_bytes))

    def tensors(self, path: str) -> dict[str, Stored]:
        """Names and shapes of the bases of the attention module at `path`.

        `down` maps the heads of a group, one after the other, to their latent, `up` it to each.
        """
        heads, head = self.num_kv_heads, self.head_dim
        return {
            f"{path}.attn.k_down": Stored((self.groups, self.k_rank, self.group * head)),
            f"{path}.attn.k_up": Stored((heads, head, self.k_rank)),
            f"{path}.attn.v_down": Stored((self.groups, self.v_rank, self.group * head)),
            f"{path}.attn.v_up": Stored((heads, head, self.v_rank)),
        }
