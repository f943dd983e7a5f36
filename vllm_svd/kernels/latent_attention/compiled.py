"""latent_attention of few query tokens on a CPU, in machine code that reads the pages in place.

Contexts are cut into parts, so that one long request uses all cores. Importing this needs no numba.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    tensors = [query] if kv_cache.dtype == torch.uint8 else [query, kv_cache]
    if k_up is not None and rope is not None:
        tensors += [k_up, rope.cos_sin]
    return all(tensor.dtype in KINDS for tensor in tensors) and native.is_there()


def warm_up() -> None:
    """Compile now, so that the first request need not wait; nothing where numba is missing."""
    if native.is_there():
        native.team()


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    output: torch.Tensor,
    requests: Sequence[int],
    most_tokens: int,
    *,
    scale: float,
    layout: LatentLayout,
    k_up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
) -> None:
    """See vllm_svd.kernels.latent_attention; for these requests, in ascending order.

    Each has a query token at least and `most_tokens` at most.
    """
    heads, width = query.shape[1:]
    v_rank, rebuilt = layout.v_rank, k_up is not None and rope is not None
    groups, block_size = kv_cache.shape[1:3]
    kv_heads = groups if k_up is None else k_up.shape[0]
    group = heads // kv_heads
    max_rows = group * most_tokens
    threads = torch.get_num_threads()
    # Parts at most: one per head and request, and those that are cut off by length.
    partial = (kv_heads * len(requests) + threads * ITEMS_PER_THREAD) * max_rows * (v_rank + 2) * 4
    partial = -(-partial // 64) * 64  # what follows starts on a cache line
    parts = _scratch_parts(width, layout.k_rank, v_rank, max_rows, rebuilt, len(requests))
    memory = native.scratch(partial + threads * parts["scratch_stride"])
    # Threads and items begun, parts finished of each head and request; then the requests.
    counts = torch.zeros(2 + kv_heads * len(requests), dtype=torch.int64)
    chosen = torch.tensor(requests)
    starts, lengths = _int32(batch.query_start_loc), _int32(batch.seq_lens)
    query, kv_cache = _rows(query), _rows(kv_cache)
    tables = _rows(_int32(batch.block_table))
    direct = output.dtype == torch.float32 and output.stride()[1:] == (v_rank, 1)
    result = output
    if not direct:
        result = torch.empty(batch.num_tokens, heads, v_rank, dtype=torch.float32)
    tiers, _alive = _tiers(layout)
    arguments: dict[str, Any] = {
        **_strided("query", query, 2),
        **_strided("cache", kv_cache, 3),
        **tiers,
        **parts,
        "scale": scale * math.log2(math.e),  # weights are powers of two
        "threads": counts.data_ptr(),
        "begun": counts.data_ptr() + 8,
        "finished": counts.data_ptr() + 16,
        "partial": memory,
        "scratch": memory + partial,
        "requests": chosen.data_ptr(),
        "num_requests": len(requests),
        "query_start_loc": starts.data_ptr(),
        "seq_lens": lengths.data_ptr(),
        "num_threads": threads,
        "kv_heads": kv_heads,
        "least_part": LEAST_PART,
        "window": sliding_window or UNLIMITED,
        "tables": tables.data_ptr(),
        "table_stride": tables.stride(0) * 4,
        "block_size": block_size,
        "shared": kv_heads // groups,
        "group": group,
        "width": width,
        "k_rank": layout.k_rank,
        "v_rank": v_rank,
        "is_neox": 1,
        "output": result.data_ptr(),
        "output_stride_0": result.stride(0) * 4,
        "max_rows": max_rows,
    }
    if k_up is not None and rope is not None:
        k_up, table = _rows(k_up), _rows(rope.cos_sin)
        arguments |= _strided("up", k_up, 2)
        arguments |= _strided("cos_sin", table, 1)
        arguments |= {"rotary_dim": table.shape[-1], "is_neox": rope.is_neox}
    native.run(arguments, threads)
    if direct:
        return
    if len(requests) == len(batch.seq_lens):
        output[: batch.num_tokens].copy_(result)
    else:
        _copy_rows(result, output, batch, requests)


def _copy_rows(
    result: torch.Tensor, output: torch.Tensor, batch: PagedBatch, requests: Sequence[int]
) -> None:
    """Of these requests alone: runs of neighbours together."""
    starts, first = batch.query_start_loc.tolist(), 0
    for i, request in enumerate(requests):
        if i + 1 == len(requests) or starts[request + 1] != starts[requests[i + 1]]:
            rows = slice(starts[requests[first]], starts[request + 1])
            output[rows] = result[rows]
            first = i + 1


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(name: str, tensor: torch.Tensor, dimensions: int) -> dict[str, int]:
    """Its address, kind, bytes of an entry and strides in bytes."""
    item = tensor.element_size()
    found = {name: tensor.data_ptr(), f"{name}_item": item}
    found[f"{name}_kind"] = KINDS.get(tensor.dtype, TIERS)
    for dimension, stride in enumerate(tensor.stride()[:dimensions]):
        found[f"{name}_stride_{dimension}"] = stride * item
    return found


@functools.lru_cache(maxsize=64)
def _scratch_parts(
    width: int, k_rank: int, v_rank: int, rows: int, rebuilt: bool, requests: int
) -> dict[str, int]:
    """Offsets of the arrays in the scratch of a thread, and its size, in bytes."""
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
        end += -(-count // 16) * 64  # no two threads on one cache line
    del offsets["plan"]  # it comes first
    return {**offsets, "scratch_stride": end, "key_width": key_width}


@functools.lru_cache(maxsize=64)
def _tiers(layout: LatentLayout) -> tuple[dict[str, int], Any]:
    """Where the tiers lie and the values of scales and fp8 codes; the arrays are to be kept."""
    if not layout.quantised:
        return {}, None
    runs = [np.array([run.numbers for run in part], dtype=np.int64) for part in layout.runs]
    scales = codec.scales().numpy()
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    addresses = {
        "k_runs": runs[0].ctypes.data,
        "k_num_runs": len(runs[0]),
        "v_runs": runs[1].ctypes.data,
        "v_num_runs": len(runs[1]),
        "scale_table": scales.ctypes.data,
        "fp8_table": fp8.ctypes.data,
    }
    return addresses, (runs, scales, fp8)
