"""Linear layers that another method quantised, as the dense weights that they stand for.

A weight [m, n] is an integer or an 8-bit float on a grid: (level - zero) * scale, with scales, and
zeros where there are any, for blocks of it. What is stored says how by its names and shapes; of
config.json only what they cannot say is read. The layouts are those of the libraries that write
them: GPTQModel, AutoAWQ (version gemm), compressed-tensors, and vLLM's fp8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offline_compress.weights.shards import DType, Headers, SourceError

Read = Callable[[str], torch.Tensor]

ACCEPTED = ("gptq", "awq", "compressed-tensors", "fp8")
_WORD = 32
_PACKED_BITS = (2, 4, 8)
# AutoAWQ stores output channel _AWQ_ORDER[i] of eight in the i-th four bits of a word.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MAIN = ("qweight", "weight_packed", "weight")
_GRIDS = ("I8", "F8_E4M3")


@dataclass(frozen=True)
class Quantised:
    """The linear layers `shapes` that the method of `config` stores, path to [m, n].

    `config` is the model's quantization_config, `headers` are of all that is stored beside it.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    headers: Headers

    @property
    def method(self) -> str:
        """Who quantised them, as config.json names it."""
        return str(self.config["quant_method"])

    def parts(self, path: str) -> list[str]:
        """Names of all that is stored of the layer's weight."""
        return [
            name
            for name in self.headers
            if name.rpartition(".")[0] == path and not name.endswith(".bias")
        ]

    def dense_headers(self, dtype: DType) -> Headers:
        """The headers as they would be with every quantised weight whole and in `dtype`.

        Raises SourceError with every layer that is not stored as ACCEPTED methods do.
        """
        hidden, problems = set(), []
        whole: Headers = {}
        for path in self.shapes:
            try:
                self._layout(path)
            except SourceError as error:
                problems.append(str(error))
            hidden.update(self.parts(path))
            whole[f"{path}.weight"] = dtype, self.shapes[path]
        if problems:
            raise SourceError(
                f"weights quantised by {self.method} are not stored as it does: "
                f"{'; '.join(problems[:8])}\nRemedy: copy the model again"
            )
        return {name: entry for name, entry in self.headers.items() if name not in hidden} | whole

    def dense(self, path: str, read: Read) -> torch.Tensor:
        """The weight [m, n] of a layer in fp32; `read` gives a stored tensor by its name."""
        return self._layout(path)(lambda part: _plain(read(f"{path}.{part}")))

    def _layout(self, path: str) -> Callable[[Read], torch.Tensor]:
        """What makes a layer of its parts; raises SourceError if they are of other shapes."""
        layer = _Layer(self.config, path, *self.shapes[path], self.headers)
        if layer.has("qweight"):
            return layer.awq() if self.method == "awq" else layer.gptq()
        return layer.packed() if layer.has("weight_packed") else layer.plain()


def quantised_layers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], headers: Headers
) -> Quantised:
    """Those of the layers `shapes` that are stored quantised; the others are dense as they are.

    Raises SourceError for a method that is not ACCEPTED, or a cache that is quantised too.
    """
    method = config.get("quant_method")
    if method not in ACCEPTED or str(config.get("version", "gemm")).lower() != "gemm":
        raise SourceError(
            f"the weights are quantised by {method} {config.get('version', '')}; accepted beside "
            f"K/V projections are {', '.join(ACCEPTED)}\nRemedy: give the model it was made from"
        )
    if config.get("kv_cache_scheme"):
        raise SourceError(
            "config.json quantises the K/V cache too (kv_cache_scheme)\n"
            "Remedy: quantise the weights alone; latents have stores of their own (--kv-store)"
        )
    found = {path: shape for path, shape in shapes.items() if _is_quantised(path, headers)}
    return Quantised(config, found, headers)


def _is_quantised(path: str, headers: Headers) -> bool:
    stored = [name for name in _MAIN if f"{path}.{name}" in headers]
    return bool(stored) and (stored != ["weight"] or headers[f"{path}.weight"][0] in _GRIDS)


@dataclass(frozen=True)
class _Layer:
    """One layer [m, n] on disk; each method checks the shapes of a layout, and gives its reader.

    A reader takes what reads a part by the last component of its name.
    """

    config: Mapping[str, Any]
    path: str
    m: int
    n: int
    headers: Headers

    def gptq(self) -> Callable[[Read], torch.Tensor]:
        """qweight [n / per word, m], qzeros [groups, m / per word], scales [groups, m], g_idx."""
        bits = self._bits("qweight", axis=0)
        per_word, groups = _WORD // bits, self._shape("scales")[0]
        self._check("qweight", (self.n // per_word, self.m))
        self._check("qzeros", (groups, self.m // per_word))
        self._check("scales", (groups, self.m))
        # The first layout stores zeros less one.
        first = 0 if self.config.get("checkpoint_format") == "gptq_v2" else 1
        groups_of = self._columns("g_idx", groups)

        def reader(read: Read) -> torch.Tensor:
            levels = _unpack(read("qweight"), bits, 0).T
            zeros = _unpack(read("qzeros"), bits, 1).T + first
            return _scaled(levels, read("scales").T, zeros, groups_of(read))

        return reader

    def awq(self) -> Callable[[Read], torch.Tensor]:
        """qweight [n, m / 8], qzeros [groups, m / 8], scales [groups, m]."""
        groups = self._shape("scales")[0]
        self._check("qweight", (self.n, self.m // 8))
        self._check("qzeros", (groups, self.m // 8))
        self._check("scales", (groups, self.m))
        place = torch.tensor(_AWQ_ORDER).argsort()
        groups_of = self._columns(None, groups)

        def unpacked(words: torch.Tensor) -> torch.Tensor:
            fields = _unpack(words, 4, 1)
            return fields.view(len(words), -1, 8)[..., place].flatten(1).T

        def reader(read: Read) -> torch.Tensor:
            levels, zeros = unpacked(read("qweight")), unpacked(read("qzeros"))
            return _scaled(levels, read("scales").T, zeros, groups_of(read))

        return reader

    def packed(self) -> Callable[[Read], torch.Tensor]:
        """weight_packed [m, words], weight_scale [m, groups], weight_zero_point packed over m."""
        bits = self._bits("weight_packed", axis=1)
        half, groups = 1 << (bits - 1), self._shape("weight_scale")[-1]
        self._check("weight_packed", (self.m, -(-self.n * bits // _WORD)))
        self._check("weight_scale", (self.m, groups))
        if self.has("weight_zero_point"):
            self._check("weight_zero_point", (-(-self.m * bits // _WORD), groups))
        groups_of = self._columns("weight_g_idx", groups)

        def reader(read: Read) -> torch.Tensor:
            levels = _unpack(read("weight_packed"), bits, 1)[:, : self.n] - half
            zeros = None
            if self.has("weight_zero_point"):
                zeros = _unpack(read("weight_zero_point"), bits, 0)[: self.m] - half
            return _scaled(levels, read("weight_scale"), zeros, groups_of(read))

        return reader

    def plain(self) -> Callable[[Read], torch.Tensor]:
        """weight [m, n] in 8 bits; weight_scale one, [m, 1], [m, groups], or of square blocks."""
        self._check("weight", (self.m, self.n))
        name = "weight_scale_inv" if self.has("weight_scale_inv") else "weight_scale"
        rows, columns = (*self._shape(name), 1, 1)[:2]
        block = self.config.get("weight_block_size")
        height, width = block or (-(-self.m // rows), -(-self.n // columns))
        if (rows, columns) != (-(-self.m // height), -(-self.n // width)):
            raise self._wrong(name, f"one for every {height} x {width} weights")
        row, column = torch.arange(self.m) // height, torch.arange(self.n) // width

        def reader(read: Read) -> torch.Tensor:
            zeros = None
            if self.has("weight_zero_point"):
                zeros = read("weight_zero_point").reshape(rows, columns)[row]
            return _scaled(read("weight"), read(name).reshape(rows, columns)[row], zeros, column)

        return reader

    def has(self, part: str) -> bool:
        """Whether it is stored."""
        return f"{self.path}.{part}" in self.headers

    def _columns(self, index: str | None, groups: int) -> Callable[[Read], torch.Tensor]:
        """The group of every column: as `index` has it where that is stored, else in order."""
        if index is not None and self.has(index):
            self._check(index, (self.n,))
            return lambda read: read(index).long()
        if self.n % groups:
            raise SourceError(f"{self.path} has {groups} groups for {self.n} columns")
        return lambda _: torch.arange(self.n) // (self.n // groups)

    def _bits(self, part: str, axis: int) -> int:
        """From how many words the levels of a row take."""
        bits = _WORD * self._shape(part)[axis] // self.n
        if bits not in _PACKED_BITS:
            raise self._wrong(part, f"{', '.join(map(str, _PACKED_BITS))} bits a weight")
        return bits

    def _shape(self, part: str) -> tuple[int, ...]:
        if not self.has(part):
            raise SourceError(f"{self.path}.{part} is missing")
        return self.headers[f"{self.path}.{part}"][1]

    def _check(self, part: str, shape: tuple[int, ...]) -> None:
        if self._shape(part) != shape:
            raise self._wrong(part, str(list(shape)))

    def _wrong(self, part: str, accepted: str) -> SourceError:
        found = list(self._shape(part))
        return SourceError(f"{self.path}.{part} is {found}, {accepted} was expected")


def _unpack(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The fields of `bits` bits of int32 words, lowest first, along `axis`."""
    shape = [1] * (words.ndim + 1)
    shape[axis + 1] = -1
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32).view(shape)
    fields = (words.unsqueeze(axis + 1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(axis, axis + 1)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Floats of any width in fp32, in which they are exact."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _scaled(
    levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, column: torch.Tensor
) -> torch.Tensor:
    """(levels [m, n] - zeros) * scales in fp32, both [m, blocks]; `column` [n] says whose is which.

    One row of blocks may stand for all.
    """
    centred = levels.float() if zeros is None else levels.float() - zeros.float()[:, column]
    return centred * scales.float()[:, column]
