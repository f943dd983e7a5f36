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
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from vllm_svd.kernels.native import matrix, sources

logger = logging.getLogger("vllm.svd")

# Where numba puts addresses that hold in one process only.
_OF_THIS_PROCESS = "numba.dynamic.globals"
_engines: list[Any] = []  # own the memory of loaded code


class Entry(NamedTuple):
    """A C function of one address."""

    address: int
    loaded: bool
    """Or compiled by this process."""


def entry(function):
    """The C function of a Python function that calls compiled ones."""
    directory = kept_in()
    file = directory and directory / f"{function.__name__}.o"
    address = file and _load(file)
    if address:
        return Entry(address, loaded=True)
    logger.info("Compiling %s for this CPU.", function.__qualname__)
    made = cfunc(types.void(types.voidptr), fastmath=False, error_model="numpy")(function)
    if file and _OF_THIS_PROCESS not in made.inspect_llvm():
        _keep(file, made)
    _engines.append(made)
    return Entry(made.address, loaded=False)


def kept_in() -> Path | None:
    """The directory of what is compiled here, made if need be; None where there can be none.

    One for each state of sources, compiler and CPU, which no one else may write to.
    """
    if os.environ.get("VLLM_DISABLE_COMPILE_CACHE", "").strip("0") or not sources.DIGEST:
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT") or f"{caches}/vllm")  # noqa: PTH111
    if root.startswith("~"):  # a user without a home
        return None
    directory = Path(root, "vllm_svd", digest())
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        found = [path.stat() for path in (directory.parent, directory)]
    except OSError as error:
        logger.info("Machine code is not kept: %s.", error)
        return None
    if any(status.st_uid != os.geteuid() or status.st_mode & 0o022 for status in found):
        logger.info("Machine code is not kept: others may write to %s.", directory)
        return None
    return directory


def digest() -> str:
    """Of all on which machine code depends."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    target = cpu_target.target_context.codegen().magic_tuple()
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__)
    # Whether this process may use matrix units is no feature of the CPU.
    parts = (sources.DIGEST, versions, target, matrix.THERE, settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _keep(file: Path, made) -> None:
    """A line of the SHA-256 of what follows, one of the symbol and of those it needs, the code."""
    module = llvm.parse_assembly(made.inspect_llvm())
    needs = [
        one.name
        for one in (*module.functions, *module.global_variables)
        if one.is_declaration and not one.name.startswith("llvm.")
    ]
    target = llvm.Target.from_triple(llvm.get_process_triple())
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = target.create_target_machine(
        cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True
    )
    head = json.dumps({"symbol": made.native_name, "needs": needs}).encode()
    contents = head + b"\n" + machine.emit_object(module)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch, file.name)
            whole.write_bytes(hashlib.sha256(contents).hexdigest().encode() + b"\n" + contents)
            whole.replace(file)
    except OSError as error:
        logger.warning("Machine code is not kept: %s.", error)


def _load(file: Path) -> int:
    """The address of the function; 0 where there is none, or not as it was written."""
    try:
        found, _, contents = file.read_bytes().partition(b"\n")
    except OSError:
        return 0
    if found != hashlib.sha256(contents).hexdigest().encode():
        logger.warning("%s is damaged, and is made again.", file)
        return 0
    line, _, code = contents.partition(b"\n")
    head = json.loads(line)
    rtsys.initialize(cpu_target.target_context)  # symbols of numba's own
    if not all(llvm.address_of_symbol(name) for name in head["needs"]):  # LLVM would abort
        return 0
    target = llvm.Target.from_triple(llvm.get_process_triple())
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), target.create_target_machine(jit=True)
    )
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(head["symbol"]))
