"""What a compressed module is on disk: one frozen model per artefact, told apart by `kind`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vllm_svd.format.delta import Delta
from vllm_svd.format.linear import Factored, Linear, Stored


class LowRank(Factored):
    """Two factors in the model's dtype: W [m, n] is approximated by B [m, r] @ A [r, n]."""

    kind: Literal["low_rank"] = "low_rank"

    @property
    def label(self) -> str:
        return f"rank {self.rank}"

    def parts(self) -> dict[str, Stored]:
        return {
            "A": Stored((self.rank, self.in_features)),
            "B": Stored((self.out_features, self.rank)),
        }


class LowRankInt8(Factored):
    """Two factors in 8 bits, but for a tail in the model's dtype.

    A = [diag(A_scale) A_int8 | A_tail] with `a_tail` columns of 16 bits, and B the stack of
    B_int8 diag(B_scale) and B_tail with `b_tail` rows of them. One scale per rank in fp32.
    """

    kind: Literal["low_rank_int8"] = "low_rank_int8"
    a_tail: NonNegativeInt = 0
    b_tail: NonNegativeInt = 0

    @property
    def label(self) -> str:
        return f"rank {self.rank}, int8"

    @model_validator(mode="after")
    def _tails_within_matrix(self) -> "LowRankInt8":
        if self.a_tail > self.in_features or self.b_tail > self.out_features:
            raise ValueError(
                f"tails of {self.a_tail} columns and {self.b_tail} rows exceed the matrix "
                f"[{self.out_features}, {self.in_features}]"
            )
        return self

    def parts(self) -> dict[str, Stored]:
        parts = {
            "A_int8": Stored((self.rank, self.in_features - self.a_tail), "I8"),
            "A_scale": Stored((self.rank,), "F32"),
            "B_int8": Stored((self.out_features - self.b_tail, self.rank), "I8"),
            "B_scale": Stored((self.rank,), "F32"),
        }
        if self.a_tail:
            parts["A_tail"] = Stored((self.rank, self.a_tail))
        if self.b_tail:
            parts["B_tail"] = Stored((self.b_tail, self.rank))
        return parts


class Codebook(Linear):
    """Vector-quantised weights: `dim` neighbouring columns of a row are one centroid.

    Each strip of `group_rows` rows and `group_columns` columns has 2**index_bits centroids of its
    own, int8 [dim] times one fp32 scale. The indices of a row are a little-endian bit stream,
    `index_bits` each, padded to whole 32-bit words; columns are padded to a multiple of `dim`.
    """

    kind: Literal["codebook"] = "codebook"
    dim: Annotated[int, Field(ge=1, le=8)]
    index_bits: Annotated[int, Field(ge=1, le=12)]
    group_rows: PositiveInt
    group_columns: PositiveInt

    @model_validator(mode="after")
    def _groups_of_whole_vectors(self) -> "Codebook":
        if self.group_columns % self.dim:
            raise ValueError(f"group_columns {self.group_columns} is no multiple of dim {self.dim}")
        return self

    @property
    def label(self) -> str:
        return f"{self.index_bits} bits per {self.dim}"

    @property
    def vectors(self) -> int:
        """Indices of one row."""
        return -(-self.in_features // self.dim)

    @property
    def groups(self) -> tuple[int, int]:
        """Strips of rows and of columns, the last of which may be narrower."""
        return (
            -(-self.out_features // self.group_rows),
            -(-self.in_features // self.group_columns),
        )

    def parts(self) -> dict[str, Stored]:
        words = -(-self.vectors * self.index_bits // 32)
        return {
            "indices": Stored((self.out_features, words), "I32"),
            "codebooks": Stored((*self.groups, 1 << self.index_bits, self.dim), "I8"),
            "scales": Stored(self.groups, "F32"),
        }


class Reduced(Linear):
    """A dense submatrix [kept_out, kept_in]: outputs that are not kept are zero.

    `rows` and `columns` are the ascending int32 indices of what is kept, absent where all are:
    y[rows] = reduced @ x[columns].
    """

    kind: Literal["reduced"] = "reduced"
    kept_out: PositiveInt
    kept_in: PositiveInt

    @property
    def label(self) -> str:
        return f"{self.kept_out} x {self.kept_in}"

    @model_validator(mode="after")
    def _within_matrix(self) -> "Reduced":
        if self.kept_out > self.out_features or self.kept_in > self.in_features:
            raise ValueError(
                f"[{self.kept_out}, {self.kept_in}] exceeds the matrix "
                f"[{self.out_features}, {self.in_features}]"
            )
        return self

    def parts(self) -> dict[str, Stored]:
        parts = {"reduced": Stored((self.kept_out, self.kept_in))}
        if self.kept_out < self.out_features:
            parts["rows"] = Stored((self.kept_out,), "I32")
        if self.kept_in < self.in_features:
            parts["columns"] = Stored((self.kept_in,), "I32")
        return parts


Module = Annotated[
    LowRank | LowRankInt8 | Codebook | Reduced | Delta,
    Field(discriminator="kind"),
]
