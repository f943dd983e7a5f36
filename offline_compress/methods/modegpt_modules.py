"""The modules of a decoder layer that MoDeGPT reduces: matrices that share channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from offline_compress.methods.block import Layer
from vllm_svd.format import Module, Reduced
from vllm_svd.format.dtypes import DTYPE_BYTES

_INDEX_BYTES = DTYPE_BYTES["I32"]


@dataclass(frozen=True)
class Side:
    """What a channel of the module is in one matrix: `lines` of its rows, or of its columns.

    A matrix is `corrected` where a bias, of it or of what it reads, loses channels too.
    """

    path: str
    lines: int = 1
    columns: bool = False
    corrected: bool = False


@dataclass(frozen=True)
class Reducible:
    """Matrices of a layer of which each has a side of the same `channels`."""

    layer: Layer
    sides: tuple[Side, ...]
    channels: int

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(side.path for side in self.sides)

    @property
    def dense(self) -> int:
        """Bytes with all channels."""
        return sum(map(self.layer.dense_bytes, self.paths))

    def budget(self, shares: Mapping[str, Fraction]) -> Fraction:
        """Bytes of the matrices that have a share, within those."""
        shared = [path for path in self.paths if path in shares]
        return sum((shares[path] * self.layer.dense_bytes(path) for path in shared), Fraction(0))

    def bytes(self, planned: Mapping[str, Module | str]) -> int:
        """Bytes of the matrices that are planned, a reason being that of a dense one."""
        return sum(
            self.layer.dense_bytes(path)
            if isinstance(module, str)
            else module.bytes(self.layer.item_bytes)
            for path, module in planned.items()
            if path in self.paths
        )

    def whole(self, shares: Mapping[str, Fraction]) -> str:
        """Why it cannot shrink, if so: matrices that share channels only shrink together."""
        dense = [path for path in self.paths if shares.get(path, Fraction(1)) >= 1]
        if len(dense) == len(self.paths):
            return "its share is all of it"
        return f"it shares channels with {', '.join(dense)}, which stays dense" if dense else ""

    def within(self, budget: Fraction, multiple: int) -> int | str:
        """The most channels in these bytes, a multiple and at least one, or why that is all."""
        left = budget - sum(map(self._correction_bytes, self.sides))
        most = int(left / sum(map(self._channel_bytes, self.sides)))
        return self.smaller(multiple * max(1, most // multiple))

    def smaller(self, size: int) -> int | str:
        """The size, if it saves bytes of every matrix."""
        saves = all(
            size * self._channel_bytes(side) + self._correction_bytes(side)
            < self.layer.dense_bytes(side.path)
            for side in self.sides
        )
        return size if saves else f"{size} of {self.channels} channels would save nothing"

    def at(self, size: int | str, shares: Mapping[str, Fraction]) -> dict[str, Module | str]:
        """The artefacts of the matrices that have a share, or the reason why it has no size."""
        return {
            side.path: size if isinstance(size, str) else self._reduced(side, size)
            for side in self.sides
            if side.path in shares
        }

    def size(self, planned: Mapping[str, Module]) -> int:
        """The channels of what `at` gave."""
        last = self.sides[-1]
        module = planned[last.path]
        assert isinstance(module, Reduced)  # of modules_at, never of a user
        return (module.kept_in if last.columns else module.kept_out) // last.lines

    def _channel_bytes(self, side: Side) -> int:
        rows, columns = self.layer.shapes[side.path]
        line = (rows if side.columns else columns) * self.layer.item_bytes
        return side.lines * (line + _INDEX_BYTES)

    def _correction_bytes(self, side: Side) -> int:
        return side.corrected * self.layer.shapes[side.path][0] * self.layer.item_bytes

    def _reduced(self, side: Side, size: int) -> Reduced:
        rows, columns = self.layer.shapes[side.path]
        kept = side.lines * size
        return Reduced(
            out_features=rows,
            in_features=columns,
            kept_out=rows if side.columns else kept,
            kept_in=kept if side.columns else columns,
            correction=side.corrected,
        )


def attention_of(layer: Layer) -> Reducible | None:
    """q, k, v and o and the channels of a head; None where they are not one matrix each."""
    try:
        query, key, value, output = map(layer.linear, ("q_proj", "k_proj", "v_proj", "o_proj"))
    except KeyError:
        return None
    sides = (
        Side(query, layer.query_heads, corrected=query in layer.biased),
        Side(key, layer.kv_heads, corrected=key in layer.biased),
        Side(value, layer.kv_heads),
        Side(output, layer.query_heads, columns=True, corrected=value in layer.biased),
    )
    return Reducible(layer, sides, layer.head_dim)


def mlps_of(layer: Layer) -> list[Reducible]:
    """gate, up and down of every gated MLP: one, or one an expert."""
    found = []
    for path in layer.shapes:
        parent, _, leaf = path.rpartition(".")
        gate, up = f"{parent}.gate_proj", f"{parent}.up_proj"
        if leaf == "down_proj" and layer.shapes.keys() >= {gate, up}:
            sides = (Side(gate), Side(up), Side(path, columns=True))
            found.append(Reducible(layer, sides, layer.shapes[up][0]))
    return found
