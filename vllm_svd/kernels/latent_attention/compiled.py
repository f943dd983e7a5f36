"""latent_attention on a CPU, in machine code that reads the pages in place.

Query tokens of a request are taken in runs, for which keys are rebuilt once; contexts are cut into
parts, so that one long request uses all cores. Importing this needs no numba.
"""

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm_svd import codec
from vllm_svd.kernels import native
from vllm_svd.kernels.latent_attention import packed, team
from vllm_svd.kernels.latent_attention.team import ITEMS_PER_THREAD, PLAN_COLUMNS, TILE
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.native import KINDS, LANES, lines, places, strided
from vllm_svd.kernels.paged_batch import PagedBatch, Rope, once_per_batch

# Parts of fewer tokens cost more to start and to combine than they balance.
LEAST_PART = 256
# Rows of queries of a KV head for which keys are rebuilt once: their states should stay in caches.
ROWS = 128
UNLIMITED = 1 << 40
LOG2_E = math.log2(math.e)  # weights are powers of two


def warm_up() -> None:
    """Compile or load now, so that no request waits for it; nothing where numba is missing."""
    if native.is_there():
        team.team()


class Requests(NamedTuple):
    """Requests of a batch, and where the machine code finds them.

    The batch itself is not kept: it lives as long as its step.
    """

    num_requests: int
    tokens: int
    most_tokens: int
    packed: bytes
    tensors: tuple[torch.Tensor, ...]
    """Their addresses are in `packed`."""
    works: dict["Sizes", "Work"]
    """Of the layers that have been asked for."""

    @classmethod
    def of(cls, batch: PagedBatch) -> "Requests":
        starts, lengths = _int32(batch.query_start_loc), _int32(batch.seq_lens)
        tables, count = _rows(_int32(batch.block_table)), len(lengths)
        packed = native.packed(
            team.BATCH,
            {
                **{"num_requests": count, "query_start_loc": starts.data_ptr()},
                **{"seq_lens": lengths.data_ptr(), "tables": tables.data_ptr()},
                "table_stride": tables.stride(0) * 4,
            },
        )
        tensors = starts, lengths, tables
        return cls(count, batch.num_tokens, batch.max_query_len, packed, tensors, {})


_requests = once_per_batch(Requests.of)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    output: torch.Tensor,
    *,
    scale: float,
    layout: LatentLayout,
    k_up: torch.Tensor | None,
    rope: Rope | None,
    sliding_window: int | None,
    soft_cap: float | None,
    v_up: torch.Tensor | None = None,
) -> bool:
    """See vllm_svd.kernels.latent_attention; all that a CPU takes, of one layer and its heads.

    False, and nothing written, on a GPU, without numba, or where a dtype is not known.

    A step of one request does this for every layer, with caches full of weights: each function
    that is new to them costs microseconds.
    """
    place = query.dtype, query.stride(), output.dtype, output.stride()
    layer: Layer | None = layout.memo.get("attend")
    if (
        layer is None
        or layer.place != place
        or layer.cache() is not kv_cache
        or not layer.bases.are_of(kv_cache.dtype, k_up, v_up, rope)
        or layer.sliding_window != sliding_window
    ):
        if not usable(query, output, kv_cache, k_up, v_up, rope and rope.cos_sin):
            return False
        if layer is not None and layer.bases.are_of(kv_cache.dtype, k_up, v_up, rope):
            bases = layer.bases
        else:
            bases = packed.bases(layout, kv_cache.dtype, k_up, v_up, rope)
        fixed = query, kv_cache, output, bases, layout, sliding_window
        layer = layout.memo["attend"] = _layer(place, *fixed)
    requests, sizes = _requests(batch), layer.sizes
    work = requests.works.get(sizes)
    if work is None:
        threads = torch.get_num_threads()
        work = requests.works[sizes] = _work(sizes, *_runs(sizes.group, requests), threads)
    scratch = native.scratch(work.size)
    addresses = query.data_ptr(), output.data_ptr(), scratch
    call = team.pack_call(scale * LOG2_E, (soft_cap or 0) * LOG2_E, *addresses)
    arguments = b"".join((call, requests.packed, layer.packed, work.packed))
    native.run(layer.code, arguments, work.threads)
    return True


def usable(
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache: torch.Tensor,
    *others: torch.Tensor | None,
) -> bool:
    """Whether a CPU with numba knows these dtypes."""
    if query.is_cuda:
        return False
    known = {query.dtype, output.dtype, *(other.dtype for other in others if other is not None)}
    stored = kv_cache.dtype in KINDS or kv_cache.dtype == torch.uint8
    return stored and known <= {*KINDS} and native.is_there()


class Sizes(NamedTuple):
    """What decides how much memory a step takes."""

    kv_heads: int
    shared: int
    group: int
    query_width: int
    width: int
    k_rank: int
    v_rank: int
    v_width: int
    slot_stride: int
    tiers: int


class Layer(NamedTuple):
    """What stays from step to step, as long as these tensors are the layer's."""

    place: tuple[Any, ...]
    cache: Callable[[], torch.Tensor | None]
    bases: packed.Bases
    sliding_window: int | None
    code: Any
    packed: bytes
    sizes: Sizes
    arrays: Any
    """Their addresses are in `packed`."""


def _layer(
    place: tuple[Any, ...],
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    bases: packed.Bases,
    layout: LatentLayout,
    sliding_window: int | None,
) -> Layer:
    """Pack the arguments LAYER."""
    tensors = {"query": query, "output": output, "cache": kv_cache}
    if any(tensor.stride(-1) != 1 for tensor in tensors.values()):
        raise ValueError("latent_attention on a CPU needs tensors of contiguous rows")
    (_, groups, block_size, _), (_, heads, query_width) = kv_cache.shape, query.shape
    k_up, v_up = bases.ups.one, bases.ups.other
    up = v_up if k_up is None else k_up
    kv_heads, item = groups if up is None else len(up), kv_cache.element_size()
    v_width = 0 if v_up is None else v_up.shape[1]
    tiers, arrays, reads = _tiers(layout)
    key_bytes = layout.k_rank * item
    if layout.quantised:
        key_bytes = layout.runs[0][-1].code_slice.stop
    # Beyond a slot, too: what is turned or decoded is read in whole vectors.
    reads = max(lines(key_bytes), reads)
    memory, slot_stride = kv_cache.untyped_storage(), lines(max(reads, layout.width * item))
    arguments = {
        **{name: value for pair in tensors.items() for name, value in strided(*pair).items()},
        **tiers,
        "width": query_width,
        **bases.arguments,
        **{"kv_heads": kv_heads, "group": heads // kv_heads, "shared": kv_heads // groups},
        **{"k_rank": layout.k_rank, "v_rank": layout.v_rank},
        **{"query_width": query_width, "v_width": v_width},
        **{"cache_end": memory.data_ptr() + memory.nbytes(), "slot_bytes": layout.width * item},
        **{"slot_stride": slot_stride, "reads": reads, "key_words": -(-key_bytes // 4)},
        **{"block_size": block_size, "least_part": LEAST_PART},
        "query_block": _query_block(heads // kv_heads),
        "window": sliding_window or UNLIMITED,
    }
    sizes = Sizes(
        kv_heads=kv_heads,
        shared=kv_heads // groups,
        group=heads // kv_heads,
        query_width=query_width,
        width=arguments["width"],
        k_rank=layout.k_rank,
        v_rank=layout.v_rank,
        v_width=v_width,
        slot_stride=slot_stride,
        tiers=len(layout.k_tiers),
    )
    return Layer(
        place=place,
        cache=weakref.ref(kv_cache),
        bases=bases,
        sliding_window=sliding_window,
        code=team.team(),
        packed=native.packed(team.LAYER, arguments),
        sizes=sizes,
        arrays=arrays,
    )


def _query_block(group: int) -> int:
    """Query tokens of a run."""
    return max(1, ROWS // group)


def _runs(group: int, requests: Requests) -> tuple[int, int]:
    """Runs at most, of few different numbers, and query tokens of one at most."""
    block = _query_block(group)
    if requests.most_tokens <= block:
        return requests.num_requests, requests.most_tokens
    return 1 << (requests.num_requests + requests.tokens // block).bit_length(), block


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Work(NamedTuple):
    """Memory of a call, and its counters, which follow the arguments."""

    threads: int
    size: int
    packed: bytes


@functools.lru_cache(maxsize=256)
def _work(sizes: Sizes, runs: int, most_tokens: int, threads: int) -> Work:
    """States of parts come first in the scratch, then the scratch of each thread."""
    rows = sizes.group * most_tokens
    # Of runs of several parts, twice as many as parts of their length: the last may be short.
    most_states = 2 * threads * ITEMS_PER_THREAD * sizes.shared // sizes.kv_heads + 1
    states = lines(sizes.kv_heads * most_states * rows * (sizes.v_rank + 2) * 4)
    k_stride, v_stride = _whole(sizes.k_rank), _whole(sizes.v_rank)
    widest = max(sizes.width, sizes.query_width, sizes.k_rank, sizes.v_width)
    query_stride, heads_rows = _whole(widest), sizes.shared * rows
    row_stride, value_stride = k_stride + LANES, v_stride + LANES  # decoding writes beyond a row
    floats = {
        "plan": (runs + 1) * PLAN_COLUMNS * 2,
        "s_query": heads_rows * query_stride,
        "s_result": rows * query_stride,
        "s_slots": LANES * sizes.slot_stride // 4,
        "s_words": LANES * sizes.slot_stride // 4,
        "s_rows": LANES * row_stride,
        "s_latents": (k_stride + LANES) * TILE,  # pairs of bf16 are turned by two vectors
        "s_scales": TILE,
        "s_quotients": sizes.tiers * TILE,
        "s_keys": sizes.width * TILE,
        "s_sums": max(1, sizes.tiers) * (sizes.width + 2 * LANES) * LANES,
        "s_v": TILE * value_stride,
        "s_weights": heads_rows * TILE,
        "s_mixed": heads_rows * v_stride,
        "s_highest": heads_rows,
        "s_total": heads_rows,
        "s_row": sizes.query_width,
    }
    offsets, end = {}, 0
    for name, count in floats.items():
        offsets[name] = end
        end += lines(4 * count)  # no two threads on one cache line
    del offsets["plan"]  # it comes first
    arguments = offsets | {
        **{"max_rows": rows, "max_runs": runs, "max_states": most_states},
        **{"num_threads": threads, "threads_scratch": states, "scratch_stride": end},
        **{"query_stride": 4 * query_stride, "key_stride": 4 * row_stride},
        "value_stride": 4 * value_stride,
    }
    counters = bytes(8 * (2 + sizes.kv_heads * runs))
    return Work(threads, states + threads * end, native.packed(team.MEMORY, arguments) + counters)


def _whole(count: int) -> int:
    """The lanes of the vectors that hold so many."""
    return -(-count // LANES) * LANES


def _tiers(layout: LatentLayout) -> tuple[dict[str, int], Any, int]:
    """Where tiers and the values of scales lie, their arrays, and bytes read from a slot on."""
    if not layout.quantised:
        return {}, None, 0
    keys, values = layout.run_numbers
    scales, reads = codec.scales().numpy(), layout.width + LANES
    addresses = {
        **{"k_runs": keys.ctypes.data, "k_num_runs": len(keys)},
        **{"v_runs": values.ctypes.data, "v_num_runs": len(values)},
        "scale_table": scales.ctypes.data,
    }
    spread = places.spread(layout.runs[1]) if packed.spreads() else None
    if spread is not None:
        addresses |= {"v_begins": spread.begins.ctypes.data, "v_tables": spread.tables.ctypes.data}
        addresses |= {"v_vectors": len(spread.begins)}
        reads = max(reads, spread.reads)
    return addresses, (keys, values, scales, spread), reads
