"""Machine code for CPUs, as Python sees it: how the compiled kernels are called, and by whom.

numba compiles a kernel at its first call or when warmed up, for this CPU, and later processes load
what it made (`entry.py`). A kernel is a C function of the address of its arguments, eight bytes
each; some of them are counters that its threads share. Importing this needs no numba.

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

from vllm_svd.kernels.native import sources as _sources  # noqa: F401 - before other modules

# Numbers by which the machine code knows dtypes and tiers.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TIERS = -1
LANES = 16  # entries of a vector: tokens or channels side by side


class _Memory(threading.local):
    """A thread's own, in whole cache lines."""

    size = -1
    address = 0

    def reserve(self, size: int) -> None:
        self.tensor = torch.empty(size + 64, dtype=torch.uint8)
        self.address, self.size = lines(self.tensor.data_ptr()), size


_memory = _Memory()


@functools.cache
def is_there() -> bool:
    """Whether numba can be imported."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def c_function(compiled: Any) -> Any:
    """A numba cfunc of one address, to be called from Python without the interpreter's lock."""
    # Else other code could not read the `__dict__` of everything that loaded modules hold, as vLLM
    # does when a further engine starts in a process: the library object of llvmlite, which has no
    # `__dict__`, would make up a C function of that name.
    from llvmlite.binding import ffi

    known = getattr(ffi.lib, "_fntab", None)
    if isinstance(known, dict):
        known.setdefault("__dict__", {})
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


def run(function: Any, arguments: bytes, threads: int) -> None:
    """Let a team of so many threads call the function, all with the same arguments.

    These must be no one else's: counters among them change.
    """
    parallel = _openmp() if threads > 1 else None
    if parallel is None:
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


def scratch(size: int) -> int:
    """Address of so many bytes, this thread's until its next call."""
    if size > _memory.size:
        _memory.reserve(size)
    return _memory.address


def lines(size: int) -> int:
    """Bytes of whole cache lines that hold so many."""
    return -(-size // 64) * 64


def packed(names: tuple[str, ...], values: dict[str, int]) -> bytes:
    """Integer arguments of these names; what is not given is zero."""
    return struct.pack(f"{len(names)}q", *(values.get(name, 0) for name in names))


def strided(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """Arguments of a tensor: its address, kind, bytes of an entry, and strides in bytes."""
    item = tensor.element_size()
    found = {
        **{name: tensor.data_ptr(), f"{name}_item": item},
        f"{name}_kind": KINDS.get(tensor.dtype, TIERS),
    }
    for dimension, stride in enumerate(tensor.stride()):
        found[f"{name}_stride_{dimension}"] = stride * item
    return found
