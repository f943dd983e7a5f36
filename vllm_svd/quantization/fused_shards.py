"""Where one checkpoint matrix lies inside a fused, tensor-parallel linear layer of vLLM."""

from dataclasses import dataclass
from typing import Any

from vllm_svd.format import LowRank

ShardId = str | int | None
_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Shard:
    """One checkpoint matrix [m, n] in this rank's layer; `factors` is None where it stays dense."""

    factors: LowRank | None
    rows: int
    """Output features on this tensor-parallel rank."""
    first_row: int
    """This rank's first row in the checkpoint's matrix."""
    latent: slice
    """Its rows of the layer's A, and so its channels of the latent; empty where dense."""
    place: slice
    """Its elements of the layer's flat B, or its rows of the layer's dense weight."""


def shard_index(shard_id: ShardId) -> int:
    """Position of a shard: vLLM names fused qkv shards q, k, v and others by number."""
    if isinstance(shard_id, str):
        return _QKV[shard_id]
    return shard_id or 0


def local_shards(
    layer: Any, factors: list[LowRank | None], rows: list[int], row_parallel: bool
) -> list[Shard]:
    """The shards of `layer` on this rank, in output order.

    K and V heads are replicated when the tensor-parallel size exceeds their number.
    """
    replicas = getattr(layer, "num_kv_head_replicas", 1)
    shards: list[Shard] = []
    latents = elements = dense_rows = 0
    for index, (matrix, count) in enumerate(zip(factors, rows, strict=True)):
        tp_rank = layer.tp_rank // replicas if index > 0 else layer.tp_rank
        first_row = 0 if row_parallel else tp_rank * count
        if matrix is None:
            latent = slice(latents, latents)
            place = slice(dense_rows, dense_rows + count)
            dense_rows += count
        else:
            latent = slice(latents, latents + matrix.rank)
            place = slice(elements, elements + count * matrix.rank)
            latents, elements = latent.stop, place.stop
        shards.append(Shard(matrix, count, first_row, latent, place))
    return shards
