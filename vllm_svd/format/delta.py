"""A fine-tuned weight as the base model's weight plus a sparse factored difference."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from vllm_svd.format.linear import Factored, Shape, Stored

Bits = Literal[4, 8, 16]
Masks = Literal["seeded", "bitmap"]


class Delta(Factored):
    """W = base + U V^T with U [m, r] and V [n, r], of which `kept_u` and `kept_v` entries stay.

    `U` and `V` hold these entries alone, by column and then by row. With 16 bits they are in the
    model's dtype; with 8 they are int8, with 4 two's complement nibbles, the first the low one,
    and column k of U V^T is multiplied by `scale[k]`.

    `masks` says where the entries stand. bitmap: `U_bitmap` and `V_bitmap` have one bit an entry,
    by column and then by row, the first the lowest of its byte. seeded: `U_count` and `V_count`
    are how many entries each column keeps, and these are the ones with its smallest keys. With
    words of 32 bits, sums modulo 2^32, logical shifts and mix(x) the bijection
        x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16
    of C. Wellons (hash-prospector), the key of row i of column k is
    mix(mix(mix(seed + f) ^ k) ^ mix(i)), f = 0 for U and 1 for V: the keys of a column never tie,
    and every machine finds the same.
    """

    kind: Literal["delta"] = "delta"
    kept_u: PositiveInt
    kept_v: PositiveInt
    bits: Bits = 16
    masks: Masks = "seeded"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0

    @property
    def label(self) -> str:
        return f"rank {self.rank}, {self.kept_u + self.kept_v} entries of {self.bits} bits"

    @model_validator(mode="after")
    def _entries_within_factors(self) -> Self:
        for name, (length, kept) in self.factors().items():
            if kept > length * self.rank:
                raise ValueError(
                    f"{kept} entries exceed {name} [{length}, {self.rank}]; "
                    f"it has {length * self.rank}"
                )
        return self

    def factors(self) -> dict[str, tuple[int, int]]:
        """Rows of each factor and how many of its entries are kept."""
        return {"U": (self.out_features, self.kept_u), "V": (self.in_features, self.kept_v)}

    def parts(self) -> dict[str, Stored]:
        parts = {}
        for name, (length, kept) in self.factors().items():
            parts[name] = Stored(*_values(kept, self.bits))
            if self.masks == "bitmap":
                parts[f"{name}_bitmap"] = Stored((-(-length * self.rank // 8),), "U8")
            else:
                parts[f"{name}_count"] = Stored((self.rank,), "I32")
        if self.bits != 16:
            parts["scale"] = Stored((self.rank,), "F32")
        return parts


def _values(kept: int, bits: Bits) -> tuple[Shape, str | None]:
    if bits == 16:
        return (kept,), None
    return ((kept,), "I8") if bits == 8 else ((-(-kept // 2),), "U8")
