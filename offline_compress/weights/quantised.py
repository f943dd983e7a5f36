"""Linear layers that another method quantised, as the dense weights that they stand for.

A weight [m, n] is an integer or an 8-bit float on a grid: (level - zero) * scale, with scales, and
zeros where there are any, for blocks of it. What is stored says how by its names and shapes; of
config.json only what they cannot say is read. The layouts are those of the libraries that write
them: GPTQModel, AutoAWQ (version gemm), compressed-tensors, and vLLM's fp8.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from offline_compress.weights.shards import DType, Headers, SourceError
from vllm_svd.format.dtypes import DTYPE_BYTES

Read = Callable[[str], torch.Tensor]

ACCEPTED = ("gptq", "awq", "compressed-tensors", "fp8")
_WORD = 32
_PACKED_BITS = (2, 4, 8)
# AutoAWQ stores output channel _AWQ_ORDER[i] of eight in the i-th four bits of a word.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MAIN = ("qweight", "weight_packed", "weight")
_LEVELS, _GRIDS, _FLOATS = ("I32",), ("I8", "F8_E4M3"), ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Quantised:
    """The linear layers `shapes` that the method of `config` stores, path to [m, n].

    `config` is the model's quantization_config, `headers` are of all that is stored beside it,
    `tensors` the names of all that the model has.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    headers: Headers
    tensors: Collection[str]

    @property
    def method(self) -> str:
        """Who quantised them, as config.json names it."""
        return str(self.config["quant_method"])

    def parts(self, path: str) -> list[str]:
        """Names of all that is stored of the layer's weight."""
        return self._parts[path]

    @property
    def surplus_biases(self) -> list[str]:
        """Biases that the model has no place for: some libraries write zeros for every layer."""
        return [name for path in self.shapes for name in self.parts(path) if name.endswith(".bias")]

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {path: [] for path in self.shapes}
        for name in self.headers:
            path = name.rpartition(".")[0]
            if path in found and not (name.endswith(".bias") and name in self.tensors):
                found[path].append(name)
        return found

    def dense_headers(self, dtype: DType) -> Headers:
        """The headers as they would be with every quantised weight whole and in `dtype`.

        Raises SourceError with every layer that is not stored as its method does.
        """
        hidden, problems = set(), []
        whole: Headers = {}
        for path in self.shapes:
            try:
                self._layout(path)
            except SourceError as error:
                problems.append(str(error))
            problems += [
                f"{name} is {self.headers[name][0]}; {', '.join(DTYPE_BYTES)} are accepted"
                for name in self.parts(path)
                if self.headers[name][0] not in DTYPE_BYTES
            ]
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


def check_method(config: Mapping[str, Any]) -> None:
    """Raises SourceError for a quantization_config that is not read, or quantises the cache."""
    method, version = config.get("quant_method"), config.get("version", "gemm")
    other_awq = method == "awq" and str(version).lower() != "gemm"
    if method not in ACCEPTED or other_awq or config.get("transform_config"):
        given = f"{method} {version}" if other_awq else method
        if config.get("transform_config"):
            given = f"{method} with transforms of activations"
        raise SourceError(
            f"the weights are quantised by {given}; accepted beside K/V projections are "
            f"{', '.join(ACCEPTED)}\nRemedy: give the model it was made from"
        )
    if config.get("kv_cache_scheme"):
        raise SourceError(
            "config.json quantises the K/V cache too (kv_cache_scheme)\n"
            "Remedy: quantise the weights alone; latents have stores of their own (--kv-store)"
        )


def quantised_layers(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    headers: Headers,
    tensors: Collection[str],
) -> Quantised:
    """Those of the layers `shapes` that are stored quantised; the others are dense as they are.

    `tensors` are the names of all that the model has. Raises what check_method raises.
    """
    check_method(config)
    found = {path: shape for path, shape in shapes.items() if _is_quantised(path, headers)}
    return Quantised(config, found, headers, tensors)


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
        per_word, groups = _WORD // bits, self._shape("scales", 2)[0]
        self._check("qweight", (self.n // per_word, self.m), _LEVELS)
        self._check("qzeros", (groups, self.m // per_word), _LEVELS)
        self._check("scales", (groups, self.m), _FLOATS)
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
        groups = self._shape("scales", 2)[0]
        self._check("qweight", (self.n, self.m // 8), _LEVELS)
        self._check("qzeros", (groups, self.m // 8), _LEVELS)
        self._check("scales", (groups, self.m), _FLOATS)
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
        half, groups = 1 << (bits - 1), self._shape("weight_scale", 2)[1]
        self._check("weight_packed", (self.m, -(-self.n * bits // _WORD)), _LEVELS)
        self._check("weight_scale", (self.m, groups), _FLOATS)
        if self.has("weight_zero_point"):
            self._check("weight_zero_point", (-(-self.m * bits // _WORD), groups), _LEVELS)
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
        self._check("weight", (self.m, self.n), _GRIDS)
        name = "weight_scale_inv" if self.has("weight_scale_inv") else "weight_scale"
        rows, columns = (*self._shape(name), 1, 1)[:2]
        height, width = self._block(rows, columns)
        self._check(name, self._shape(name), _FLOATS)
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

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of what has one scale: as declared, else as `rows` and `columns` divide.

        The last block of an axis may be smaller, which numbers of blocks alone cannot say.
        """
        declared = self.config.get("weight_block_size")
        groups = self.config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict) and rows > 1 and columns > 1:
                declared = weights.get("block_structure") or declared
        if declared is None:
            if rows < 1 or columns < 1 or self.m % rows or self.n % columns:
                raise SourceError(f"{self.path} has {rows} x {columns} scales for its weight")
            return self.m // rows, self.n // columns
        match declared:
            case [int(height), int(width)] if height > 0 and width > 0:
                return height, width
        raise SourceError(f"blocks of weights are {declared!r}; two positive sizes were expected")

    def _columns(self, index: str | None, groups: int) -> Callable[[Read], torch.Tensor]:
        """The group of every column: as `index` has it where that is stored, else in order."""
        if index is None or not self.has(index):
            if groups < 1 or self.n % groups:
                raise SourceError(f"{self.path} has {groups} groups for {self.n} columns")
            return lambda _: torch.arange(self.n) // (self.n // groups)
        self._check(index, (self.n,), _LEVELS)

        def stored(read: Read) -> torch.Tensor:
            group = read(index).long()
            if group.min() < 0 or group.max() >= groups:
                raise SourceError(
                    f"{self.path}.{index} names groups beyond {groups}\n"
                    "Remedy: copy the model again"
                )
            return group

        return stored

    def _bits(self, part: str, axis: int) -> int:
        """From how many words the levels of a row take."""
        bits = _WORD * self._shape(part, 2)[axis] // self.n
        if bits not in _PACKED_BITS:
            raise self._wrong(part, f"{', '.join(map(str, _PACKED_BITS))} bits a weight")
        return bits

    def _shape(self, part: str, dimensions: int | None = None) -> tuple[int, ...]:
        if not self.has(part):
            raise SourceError(f"{self.path}.{part} is missing")
        shape = self.headers[f"{self.path}.{part}"][1]
        if dimensions is not None and len(shape) != dimensions:
            raise self._wrong(part, f"{dimensions} dimensions")
        return shape

    def _check(self, part: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        if self._shape(part) != shape:
            raise self._wrong(part, str(list(shape)))
        if self.headers[f"{self.path}.{part}"][0] not in dtypes:
            raise self._wrong(part, " or ".join(dtypes))

    def _wrong(self, part: str, accepted: str) -> SourceError:
        dtype, shape = self.headers[f"{self.path}.{part}"]
        return SourceError(f"{self.path}.{part} is {dtype} {list(shape)}; {accepted} was expected")


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
