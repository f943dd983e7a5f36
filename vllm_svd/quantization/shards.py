"""Where the checkpoint matrices of a linear layer of vLLM lie: ranks, and parts in parameters.

A fused layer (qkv_proj, gate_up_proj) has one shard a matrix. Parts of the same name, of whatever
shape, lie one after another in one flat parameter of that name, so that the names of a checkpoint
are the names of parameters and vLLM's loading finds them by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_svd.errors import CheckpointFormatError, UnsupportedModelError
from vllm_svd.format import Module, Stored
from vllm_svd.quantization.codebook import CodebookMatrix
from vllm_svd.quantization.low_rank import LowRankMatrix
from vllm_svd.quantization.low_rank_int8 import LowRankInt8Matrix
from vllm_svd.quantization.matrix import Dense, DenseMatrix, Matrix, length
from vllm_svd.quantization.reduced import ReducedMatrix

MATRICES: dict[str, type[Matrix]] = {
    "low_rank": LowRankMatrix,
    "low_rank_int8": LowRankInt8Matrix,
    "codebook": CodebookMatrix,
    "reduced": ReducedMatrix,
}
"""What serves each kind of module."""

ShardId = str | int | None
_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Piece:
    """This rank's part of one stored tensor."""

    stored: Stored
    index: tuple[slice, ...]
    shape: tuple[int, ...]
    place: slice
    """Its elements of the layer's parameter of that name."""


@dataclass(frozen=True)
class Shard:
    """One checkpoint matrix in this rank's layer."""

    matrix: Matrix
    pieces: Mapping[str, Piece]

    def part(self, layer: Any, name: str) -> torch.Tensor:
        """The view of `layer`'s parameter that holds this shard's part."""
        piece = self.pieces[name]
        view: torch.Tensor = getattr(layer, name)[piece.place].view(piece.shape)
        return view

    @property
    def channels(self) -> slice:
        """A low-rank shard's channels of the latents of the layer."""
        A = self.pieces["A"]  # noqa: N806
        return slice(A.place.start // A.shape[1], A.place.stop // A.shape[1])

    def parts(self, layer: Any) -> dict[str, torch.Tensor]:
        return {name: self.part(layer, name) for name in self.pieces}


def shard_index(shard_id: ShardId) -> int:
    """Position of a shard: vLLM names fused qkv shards q, k, v and others by number."""
    if isinstance(shard_id, str):
        return _QKV[shard_id]
    return shard_id or 0


def local_shards(
    layer: Any,
    modules: Sequence[Module | None],
    sizes: Sequence[int],
    output_size: int,
    columns: int,
) -> list[Shard]:
    """The shards of `layer` on this rank, in output order; `modules` has None where one is dense.

    `sizes` are the output features of each shard on this rank, `output_size` those of the layer on
    all of them, `columns` the input features on this rank. K and V heads are replicated when the
    tensor-parallel size exceeds their number. Raises CheckpointFormatError where config.json gives
    a matrix another size than the layer has, UnsupportedModelError where it cannot be split.
    """
    split = output_size > sum(sizes)
    if len(modules) == 1 and not split:
        sizes = [sum(sizes)]  # fused on disk: one matrix is all shards
    if len(modules) != len(sizes):
        raise UnsupportedModelError(
            f"{layer.prefix} is one matrix, of which every rank needs {len(sizes)} parts",
            "compressed matrices that are fused in the checkpoint, on one rank",
            "start vLLM with --tensor-parallel-size 1",
        )
    first_column = layer.tp_rank * columns if columns < layer.input_size else 0
    kv_replicas = getattr(layer, "num_kv_head_replicas", 1)
    offsets: dict[str, int] = {}
    shards, problems = [], []
    for index, (module, size) in enumerate(zip(modules, sizes, strict=True)):
        replicas = kv_replicas if index > 0 else 1
        groups, group = (layer.tp_size // replicas, layer.tp_rank // replicas) if split else (1, 0)
        expected = Dense(size * groups, layer.input_size)
        problems += _misfits(index, module, expected)
        kind = DenseMatrix if module is None else MATRICES[module.kind]
        matrix = kind(
            module or expected,
            slice(group * size, (group + 1) * size),
            slice(first_column, first_column + columns),
            f"{layer.prefix} shard {index}",
        )
        shards.append(Shard(matrix, _placed(matrix, offsets)))
    if problems:
        raise CheckpointFormatError(
            layer.prefix, problems, "restore config.json, or compress the model again"
        )
    return shards


def _misfits(index: int, module: Module | None, expected: Dense) -> list[str]:
    if module is None:
        return []
    m, n = expected.out_features, expected.in_features
    problems = []
    if module.out_features != m:
        problems.append(f"shard {index} has {m} rows, {module} does not")
    if module.in_features != n:
        problems.append(f"shard {index} has {n} columns, {module} does not")
    return problems


def _placed(matrix: Matrix, offsets: dict[str, int]) -> dict[str, Piece]:
    """The pieces of `matrix`, behind what the `offsets` say is taken; these move on."""
    pieces = {}
    stored = matrix.stored()
    for name, index in matrix.indices().items():
        shape = tuple(length(part) for part in index)
        first = offsets.get(name, 0)
        offsets[name] = first + math.prod(shape)
        pieces[name] = Piece(stored[name], index, shape, slice(first, offsets[name]))
    return pieces
