"""latent_attention of few query tokens on a CPU, in machine code that reads the pages in place.

Contexts are cut into parts, so that one long request uses all cores. Importing this needs no numba.
"""

import ctypes
import functools
import math
import struct
from typing import Any, NamedTuple

import torch

from vllm_svd import codec
from vllm_svd.kernels.latent_attention import native
from vllm_svd.kernels.latent_attention.native import (
    AHEAD,
    ITEMS_PER_THREAD,
    KINDS,
    LANES,
    PLAN_COLUMNS,
    TIERS,
    TILE,
)
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch, Rope

# Parts of fewer tokens cost more to start and to combine than they balance.
LEAST_PART = 256
UNLIMITED = 1 << 40


def usable(
    query: torch.Tensor, kv_cache: torch.Tensor, k_up: torch.Tensor | None, rope: Rope | None
) -> bool:
    """Whether numba is there and these dtypes are known."""
    known = query.dtype in KINDS and (kv_cache.dtype in KINDS or kv_cache.dtype == torch.uint8)
    if k_up is not None and rope is not None:
        known = known and k_up.dtype in KINDS and rope.cos_sin.dtype in KINDS
    return known and native.is_there()


def warm_up() -> None:
    """Compile now, so that the first request need not wait; nothing where numba is missing."""
    if native.is_there():
        native.team()


class FewTokens(NamedTuple):
    """Requests of a batch, in ascending order, and where the machine code finds them.

    Of each at least one query token and at most `most_tokens`; of the batch `num_tokens`. The batch
    itself is not kept: it lives as long as its step.
    """

    requests: tuple[int, ...]
    are_all: bool
    num_tokens: int
    most_tokens: int
    addresses: tuple[int, ...]
    chosen: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def of(cls, batch: PagedBatch, requests: tuple[int, ...]) -> "FewTokens":
        chosen = torch.tensor(requests, dtype=torch.int64)
        starts, lengths = _int32(batch.query_start_loc), _int32(batch.seq_lens)
        tables = _rows(_int32(batch.block_table))
        addresses = (
            *(chosen.data_ptr(), len(requests), starts.data_ptr(), lengths.data_ptr()),
            *(tables.data_ptr(), tables.stride(0) * 4),
        )
        most_tokens = int(starts.diff()[chosen].max()) if requests else 0
        are_all = len(requests) == len(lengths)
        sizes = are_all, batch.num_tokens, most_tokens
        return cls(requests, *sizes, addresses, chosen, starts, lengths, tables)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    few: FewTokens,
    output: torch.Tensor,
    *,
    scale: float,
    layout: LatentLayout,
    k_up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
) -> None:
    """See vllm_svd.kernels.latent_attention; of a batch these requests alone.

    Python's own time counts here: a step of one request does this for every layer.
    """
    heads, width = query.shape[1:]
    v_rank, rebuilt = layout.v_rank, k_up is not None and rope is not None
    kv_heads = kv_cache.shape[1] if k_up is None else k_up.shape[0]
    requests = len(few.requests)
    max_rows = heads // kv_heads * few.most_tokens
    threads = torch.get_num_threads()
    # Threads and items begun, parts finished of each head and request.
    counts = _lines(8 * (2 + kv_heads * requests))
    # Parts at most: one per head and request, and those that are cut off by length.
    partial = (kv_heads * requests + threads * ITEMS_PER_THREAD) * max_rows * (v_rank + 2) * 4
    stride, of_scratch = _scratch_parts(width, layout.k_rank, v_rank, max_rows, rebuilt, requests)
    begun = native.scratch(counts + _lines(partial) + threads * stride)
    ctypes.memset(begun, 0, counts)
    query, kv_cache = _rows(query), _rows(kv_cache)
    result = output
    if output.dtype != torch.float32 or output.stride()[1:] != (v_rank, 1):
        result = torch.empty(few.num_tokens, heads, v_rank, dtype=torch.float32)
    if k_up is not None and rope is not None:
        k_up, rope = _rows(k_up), Rope(_rows(rope.cos_sin), rope.is_neox)
    item = query.element_size()
    native.run(
        _scale(scale),
        (
            *(begun, begun + 8, begun + 16, begun + counts, begun + counts + _lines(partial)),
            *few.addresses,
            *(query.data_ptr(), query.stride(0) * item, query.stride(1) * item),
            *(result.data_ptr(), result.stride(0) * 4, max_rows, threads),
        ),
        _of_layer(layout, query, heads, kv_cache, k_up, rope, sliding_window) + of_scratch,
        threads,
    )
    if result is output:
        return
    if few.are_all:
        output[: few.num_tokens].copy_(result)
    else:
        _copy_rows(result, output, few)


def _of_layer(
    layout: LatentLayout,
    query: torch.Tensor,
    heads: int,
    kv_cache: torch.Tensor,
    k_up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
) -> bytes:
    """The arguments LAYER, packed once for each place where its tensors lie."""
    of_up = None if k_up is None else _place(k_up)
    of_rope = None if rope is None else (_place(rope.cos_sin), rope.is_neox)
    place = _place(kv_cache)
    packed, _alive = _packed_layer(
        layout, query.dtype, heads, query.shape[2], place, of_up, of_rope, sliding_window
    )
    return packed


Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def _place(tensor: torch.Tensor) -> Place:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@functools.lru_cache(maxsize=1024)
def _packed_layer(
    layout: LatentLayout,
    dtype: torch.dtype,
    heads: int,
    width: int,
    cache: Place,
    up: Place | None,
    rope: tuple[Place, bool] | None,
    sliding_window: int | None,
) -> tuple[bytes, Any]:
    """The arguments LAYER, and the arrays of which they hold the addresses."""
    groups, block_size = cache[2][1:3]
    kv_heads = groups if up is None else up[2][0]
    tiers, arrays = _tiers(layout)
    arguments = {
        **_strided("cache", cache, 3),
        **tiers,
        "query_kind": KINDS[dtype],
        "kv_heads": kv_heads,
        "least_part": LEAST_PART,
        "window": sliding_window or UNLIMITED,
        "block_size": block_size,
        "shared": kv_heads // groups,
        "group": heads // kv_heads,
        "width": width,
        "k_rank": layout.k_rank,
        "v_rank": layout.v_rank,
        "is_neox": 1,
    }
    if up is not None and rope is not None:
        table, is_neox = rope
        arguments |= _strided("up", up, 2) | _strided("cos_sin", table, 1)
        arguments |= {"rotary_dim": table[2][-1], "is_neox": is_neox}
    return native.packed(native.LAYER, arguments), arrays


@functools.lru_cache(maxsize=64)
def _scale(scale: float) -> bytes:
    return struct.pack("d", scale * math.log2(math.e))  # weights are powers of two


def _copy_rows(result: torch.Tensor, output: torch.Tensor, few: FewTokens) -> None:
    """Of these requests alone: runs of neighbours together."""
    starts, requests, first = few.starts.tolist(), few.requests, 0
    for i, request in enumerate(requests):
        if i + 1 == len(requests) or starts[request + 1] != starts[requests[i + 1]]:
            rows = slice(starts[requests[first]], starts[request + 1])
            output[rows] = result[rows]
            first = i + 1


def _lines(size: int) -> int:
    """Bytes of whole cache lines that hold so many."""
    return -(-size // 64) * 64


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(name: str, place: Place, dimensions: int) -> dict[str, int]:
    """Its address, kind, bytes of an entry and strides in bytes."""
    address, dtype, _, strides = place
    item = dtype.itemsize
    found = {name: address, f"{name}_item": item, f"{name}_kind": KINDS.get(dtype, TIERS)}
    for dimension, stride in enumerate(strides[:dimensions]):
        found[f"{name}_stride_{dimension}"] = stride * item
    return found


@functools.lru_cache(maxsize=64)
def _scratch_parts(
    width: int, k_rank: int, v_rank: int, rows: int, rebuilt: bool, requests: int
) -> tuple[int, bytes]:
    """The scratch of a thread: its size in bytes, and the arguments SCRATCH."""
    key_width = -(-width // LANES) * LANES if rebuilt else k_rank
    floats = {
        "plan": (requests + 1) * PLAN_COLUMNS * 2,
        "s_up": key_width * k_rank * rebuilt,
        "s_query": rows * key_width,
        "s_keys": (TILE + AHEAD) * key_width * rebuilt,
        "s_k": (TILE + AHEAD) * k_rank,
        "s_v": TILE * v_rank,
        "s_weights": rows * TILE + AHEAD,
        "s_power": TILE,
        "s_mixed": rows * v_rank,
        "s_highest": rows,
        "s_total": rows,
        "s_row": max(width, LANES * k_rank),
    }
    offsets, end = {}, 0
    for name, count in floats.items():
        offsets[name] = end
        end += _lines(4 * count)  # no two threads on one cache line
    del offsets["plan"]  # it comes first
    sizes = {"scratch_stride": end, "key_width": key_width}
    return end, native.packed(native.SCRATCH, offsets | sizes)


def _tiers(layout: LatentLayout) -> tuple[dict[str, int], Any]:
    """Where the tiers lie and the values of scales and fp8 codes, as addresses and arrays."""
    if not layout.quantised:
        return {}, None
    keys, values = layout.run_numbers
    scales = codec.scales().numpy()
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    addresses = {
        "k_runs": keys.ctypes.data,
        "k_num_runs": len(keys),
        "v_runs": values.ctypes.data,
        "v_num_runs": len(values),
        "scale_table": scales.ctypes.data,
        "fp8_table": fp8.ctypes.data,
    }
    return addresses, (keys, values, scales, fp8)
