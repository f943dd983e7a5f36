"""C functions of kernels: compiled for this CPU, or loaded as an earlier process compiled them.

Compiling takes most of a server's start, in each of its workers. The object code is kept beside
what vLLM compiles, obeys the same settings (VLLM_CACHE_ROOT, VLLM_DISABLE_COMPILE_CACHE) and is
loaded by LLVM alone. numba's own cache does not fit: it sees changes of one source file only, goes
to other directories where the first is full, unpickles what it finds and does not mend it.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import cfunc, types
from numba.core import config
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from vllm_svd.kernels.native import matrix, sources
from vllm_svd.kernels.native.elf import undefined_symbols

logger = logging.getLogger("vllm.svd")

_owners: list[Any] = []  # of the memory that code lies in


class Entry(NamedTuple):
    """A C function of one address."""

    address: int
    loaded: bool
    """Or compiled by this process."""


def entry(function):
    """The C function of a Python function that calls compiled ones."""
    directory = kept_in()
    name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}.o"
    address = directory and _load(directory / name)
    if address:
        return Entry(address, loaded=True)
    logger.info("Compiling %s for this CPU.", function.__qualname__)
    made = cfunc(types.void(types.voidptr), fastmath=False, error_model="numpy")(function)
    if directory:
        _keep(directory / name, made)
    _owners.append(made)
    return Entry(made.address, loaded=False)


def kept_in() -> Path | None:
    """The directory of what is compiled here, made if need be; None where there can be none.

    One for each state of sources, compiler and CPU.
    """
    if os.environ.get("VLLM_DISABLE_COMPILE_CACHE", "").strip("0") or not sources.DIGEST:
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT") or f"{caches}/vllm")  # noqa: PTH111
    directory = Path(root, "vllm_svd", digest())
    try:
        if root.startswith("~"):
            raise OSError("this user has no home")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.info("Machine code is not kept: %s.", error)
        return None
    return directory


def digest() -> str:
    """Of all on which machine code depends."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    target = cpu_target.target_context.codegen().magic_tuple()
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__)
    # Whether this process may use matrix units is no feature of the CPU.
    parts = (sources.DIGEST, versions, target, matrix.THERE, settings, config.USING_SVML)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _keep(file: Path, made: Any) -> None:
    """A line of the SHA-256 of what follows, one of the symbol and of those it needs, the code."""
    try:
        library = made._library
        if library.has_dynamic_globals or sources.digest(sources.PACKAGE) != sources.DIGEST:
            logger.warning("%s is not kept: it would not fit another process.", file)
            return
        _, _, (code, _) = library.serialize_using_object_code()
        head = {"symbol": made.native_name, "needs": undefined_symbols(code)}
        contents = json.dumps(head).encode() + b"\n" + code
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch, file.name)
            whole.write_bytes(hashlib.sha256(contents).hexdigest().encode() + b"\n" + contents)
            whole.chmod(0o644)
            whole.replace(file)
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("Machine code is not kept: %s.", error)


def _load(file: Path) -> int:
    """The address of the function; 0 where there is none, or not as this user or root wrote it."""
    try:
        with file.open("rb") as opened:
            status, whole = os.fstat(opened.fileno()), opened.read()
    except OSError:
        return 0
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        logger.warning("%s is not loaded: others own it or may write to it.", file)
        return 0
    found, _, contents = whole.partition(b"\n")
    if found != hashlib.sha256(contents).hexdigest().encode():
        logger.warning("%s is damaged, and is made again.", file)
        return 0
    line, _, code = contents.partition(b"\n")
    head = json.loads(line)
    rtsys.initialize(cpu_target.target_context)  # symbols of numba's own
    missing = [name for name in head["needs"] if not llvm.address_of_symbol(name)]
    if missing:  # of which LLVM would abort
        logger.warning("%s is made again: %s is not there.", file, missing[0])
        return 0
    target = llvm.Target.from_triple(llvm.get_process_triple())
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), target.create_target_machine(jit=True)
    )
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _owners.append(engine)
    return int(engine.get_function_address(head["symbol"]))
