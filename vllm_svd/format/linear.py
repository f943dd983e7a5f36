"""What every artefact of a linear layer has in common."""

import math
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from vllm_svd.format.dtypes import DTYPE_BYTES

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """Shape of a stored tensor, and its dtype where that is not the model's own."""

    shape: Shape
    dtype: str | None = None

    def bytes(self, item_bytes: int) -> int:
        """Bytes in a checkpoint whose own dtype takes `item_bytes`."""
        item = item_bytes if self.dtype is None else DTYPE_BYTES[self.dtype]
        return math.prod(self.shape) * item


class Linear(BaseModel):
    """A linear layer W [m, n] without its dense weight; its bias, if any, stays as it was.

    With `correction` a vector [m] is added to the output: what the approximation loses of the
    mean input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out_features: PositiveInt
    in_features: PositiveInt
    correction: bool = False

    def parts(self) -> dict[str, Stored]:
        """The tensors of this artefact, by the suffix of their names."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The artefact in a few words, for tables."""
        raise NotImplementedError

    def tensors(self, path: str) -> dict[str, Stored]:
        """Names and shapes of everything stored for the module at `path`."""
        parts = self.parts()
        if self.correction:
            parts["correction"] = Stored((self.out_features,))
        return {f"{path}.{suffix}": stored for suffix, stored in parts.items()}

    def bytes(self, item_bytes: int) -> int:
        """Bytes on disk in a checkpoint whose own dtype takes `item_bytes`."""
        return sum(stored.bytes(item_bytes) for stored in self.tensors("").values())


class Factored(Linear):
    """An artefact with a rank."""

    rank: PositiveInt

    @model_validator(mode="after")
    def _rank_within_matrix(self) -> "Factored":
        largest = min(self.out_features, self.in_features)
        if self.rank > largest:
            raise ValueError(
                f"rank {self.rank} exceeds the matrix "
                f"[{self.out_features}, {self.in_features}]; the largest rank is {largest}"
            )
        return self
