"""Where one checkpoint matrix lies inside a fused, tensor-parallel linear layer of vLLM."""

from dataclasses import dataclass
from typing import Any

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import LowRank

ShardId = str | int | None
_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Shard:
    """One checkpoint matrix [m, n] in this rank's layer; `factors` is None where it stays dense."""

    factors: LowRank | None
    rows: int
    """Output features on this tensor-parallel rank."""
    group: int
    """Which of the groups of `rows` output features of the checkpoint's matrix is this rank's."""
    latent: slice
    """Its rows of the layer's A, and so its channels of the latent; empty where dense."""
    place: slice
    """Its elements of the layer's flat B, or its rows of the layer's dense weight."""

    def rows_of(self, out_features: int) -> slice:
        """This rank's rows of a matrix of `out_features`, all of them where it is not split."""
        first = 0 if out_features == self.rows else self.group * self.rows
        return slice(first, first + self.rows)


def shard_index(shard_id: ShardId) -> int:
    """Position of a shard: vLLM names fused qkv shards q, k, v and others by number."""
    if isinstance(shard_id, str):
        return _QKV[shard_id]
    return shard_id or 0


def local_shards(layer: Any, factors: list[LowRank | None], rows: list[int]) -> list[Shard]:
    """The shards of `layer` on this rank, in output order.

    K and V heads are replicated when the tensor-parallel size exceeds their number. Raises
    CheckpointFormatError where config.json gives a matrix another size than the layer has.
    """
    replicas = getattr(layer, "num_kv_head_replicas", 1)
    shards: list[Shard] = []
    latents = elements = dense_rows = 0
    problems = []
    for index, (matrix, count) in enumerate(zip(factors, rows, strict=True)):
        group = layer.tp_rank // replicas if index > 0 else layer.tp_rank
        if matrix is None:
            latent = slice(latents, latents)
            place = slice(dense_rows, dense_rows + count)
            dense_rows += count
        else:
            groups = layer.tp_size // replicas if index > 0 else layer.tp_size
            if matrix.out_features not in (count, count * groups):
                problems.append(f"shard {index} has {count * groups} rows, {matrix} does not")
            if matrix.in_features != layer.input_size:
                problems.append(f"shard {index} has {layer.input_size} columns, {matrix} does not")
            latent = slice(latents, latents + matrix.rank)
            place = slice(elements, elements + count * matrix.rank)
            latents, elements = latent.stop, place.stop
        shards.append(Shard(matrix, count, group, latent, place))
    if problems:
        raise CheckpointFormatError(
            layer.prefix, problems, "restore config.json, or compress the model again"
        )
    return shards
