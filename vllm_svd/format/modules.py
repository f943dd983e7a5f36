"""What a compressed module is on disk: one frozen model per artefact, told apart by `kind`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

Shape = tuple[int, ...]


class LowRank(BaseModel):
    """A linear layer stored as two factors: W [m, n] is approximated by B [m, r] @ A [r, n]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["low_rank"] = "low_rank"
    out_features: PositiveInt
    in_features: PositiveInt
    rank: PositiveInt

    @model_validator(mode="after")
    def _rank_within_matrix(self) -> "LowRank":
        largest = min(self.out_features, self.in_features)
        if self.rank > largest:
            raise ValueError(
                f"rank {self.rank} exceeds the matrix "
                f"[{self.out_features}, {self.in_features}]; the largest rank is {largest}"
            )
        return self

    def tensors(self, path: str) -> dict[str, Shape]:
        """Names and shapes of the stored factors of the module at `path`."""
        return {
            f"{path}.A": (self.rank, self.in_features),
            f"{path}.B": (self.out_features, self.rank),
        }


Module = LowRank  # a discriminated union on `kind` once a second artefact exists


class KVProjection(BaseModel):
    """K/V channel projections of one attention layer, one pair of bases per KV head.

    `pre`: the key is projected before RoPE and rebuilt, then rotated, at attention time.
    `post`: rotated keys and queries are projected; attention runs in k_rank channels.
    The value is projected in both; the attention output is expanded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["pre", "post"]
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    k_rank: PositiveInt
    v_rank: PositiveInt

    @model_validator(mode="after")
    def _ranks_within_head(self) -> "KVProjection":
        for name, rank in (("k_rank", self.k_rank), ("v_rank", self.v_rank)):
            if rank > self.head_dim:
                raise ValueError(
                    f"{name} {rank} exceeds the head size; the largest is {self.head_dim}"
                )
        return self

    @property
    def channels_per_token(self) -> int:
        """Cached channels of this layer for one token, over all KV heads."""
        return self.num_kv_heads * (self.k_rank + self.v_rank)

    def tensors(self, path: str) -> dict[str, Shape]:
        """Names and shapes of the bases of the attention module at `path`."""
        heads, head = self.num_kv_heads, self.head_dim
        return {
            f"{path}.attn.k_down": (heads, self.k_rank, head),
            f"{path}.attn.k_up": (heads, head, self.k_rank),
            f"{path}.attn.v_down": (heads, self.v_rank, head),
            f"{path}.attn.v_up": (heads, head, self.v_rank),
        }
