"""The compiled decode path as seen from Python: its arguments, and who runs it.

numba compiles it at the first call or by `warm_up`, once per process (some ten seconds), for this
CPU; nothing is cached on disk, where workers would share one directory that may be read-only.

Its threads are torch's: torch's own OpenMP runtime is asked for a team. A second pool (numba's)
would fight over the cores with torch's threads, which spin between operators, would inherit the
one core to which vLLM binds the thread that starts it, and is either not safe to call from two
threads (workqueue) or aborts in forked processes (omp). This is safe wherever torch itself is.
"""

import ctypes
import functools
import importlib
import struct
import threading
from typing import Any

import torch

# Numbers by which the machine code knows dtypes and tiers.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TIERS = -1
TILE = 64  # tokens whose latents are decoded, and keys rebuilt, at a time
AHEAD = 8  # tokens whose scores are computed at a time: rows that follow a tile's keys
ROWS, LANES = 4, 16  # of a product whose sums stay in registers
ITEMS_PER_THREAD = 4
PLAN_COLUMNS = 7
# Arguments of the machine code, eight bytes each, all but the first integers: addresses, sizes,
# strides in bytes; `s_` are offsets in the scratch of a thread. Those of a step, in this order, are
# followed by those of a layer and by those of the scratch, which are packed once.
_STEP = """
threads begun finished partial scratch requests num_requests query_start_loc seq_lens
tables table_stride query query_stride_0 query_stride_1 output output_stride_0 max_rows num_threads
"""
_LAYER = """
kv_heads least_part window block_size
cache cache_kind cache_item cache_stride_0 cache_stride_1 cache_stride_2
k_runs k_num_runs v_runs v_num_runs scale_table fp8_table
query_kind shared group width k_rank v_rank
up up_kind up_stride_0 up_stride_1
cos_sin cos_sin_kind cos_sin_stride_0 rotary_dim is_neox
"""
_SCRATCH = """
scratch_stride key_width
s_up s_query s_keys s_k s_v s_weights s_power s_mixed s_highest s_total s_row
"""
STEP, LAYER, SCRATCH = (tuple(names.split()) for names in (_STEP, _LAYER, _SCRATCH))
FIELDS = ("scale", *STEP, *LAYER, *SCRATCH)
_step = struct.Struct(f"{len(STEP)}q")

_memory = threading.local()


def packed(names: tuple[str, ...], values: dict[str, int]) -> bytes:
    """Fields of LAYER or SCRATCH; what is not given is zero."""
    return struct.pack(f"{len(names)}q", *(values.get(name, 0) for name in names))


def run(scale: bytes, step: tuple[int, ...], rest: bytes, threads: int) -> None:
    """Run a team of so many threads with the arguments FIELDS, those of `step` in its order."""
    arguments = scale + _step.pack(*step) + rest
    function, parallel = team(), _openmp()
    if parallel is None or threads == 1:
        function(arguments)
    else:
        parallel(function, arguments, threads, 0)


@functools.cache
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP runtime that torch is linked to; None where it is another ABI.

    torch loads its runtime for all to see, so this is found as torch's own calls are, whatever is
    preloaded (LLVM's and Intel's runtimes have this entry, too).
    """
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is not None:
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
    return parallel


@functools.cache
def is_there() -> bool:
    """Whether numba can be imported."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


@functools.cache
def team() -> Any:
    """The compiled C function of the address of packed arguments; compiles it at first."""
    from vllm_svd.kernels.latent_attention import native_team

    keep_namespaces_plain()
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(native_team.team.address)


def keep_namespaces_plain() -> None:
    """Let other code read the `__dict__` of everything that loaded modules hold.

    vLLM does when a further engine starts in a process; the library object of llvmlite, which has
    no `__dict__`, would make up a C function of that name.
    """
    from llvmlite.binding import ffi

    known = getattr(ffi.lib, "_fntab", None)
    if isinstance(known, dict):
        known.setdefault("__dict__", {})


def scratch(size: int) -> int:
    """Address of so many bytes, this thread's until its next call."""
    memory: torch.Tensor | None = getattr(_memory, "tensor", None)
    if memory is None or memory.numel() < size + 64:
        memory = _memory.tensor = torch.zeros(size + 64, dtype=torch.uint8)
    return -(-memory.data_ptr() // 64) * 64
