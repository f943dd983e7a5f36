"""C functions of kernels: compiled for this CPU, or as an earlier process compiled them.

To compile them takes most of a server's start, in every worker. numba keeps their machine code, in
files of its own that are as good as code: they lie beside what vLLM compiles and obey its settings,
VLLM_CACHE_ROOT and VLLM_DISABLE_COMPILE_CACHE, in a directory that no one else may write to, one
for each state of the sources, CPU and version, since numba by itself would look at the date of one
file only. Where there can be no such directory each process compiles.
"""

import hashlib
import logging
import os
import sys
from pathlib import Path

import numba
from numba import cfunc, types
from numba.core import config
from numba.core.registry import cpu_target

logger = logging.getLogger("vllm.svd")

PACKAGE = Path(__file__).parents[2]
_SIGNATURE = types.void(types.voidptr)
_OPTIONS = {"fastmath": False, "error_model": "numpy"}


def entry(function):
    """A numba cfunc of one address from a function that calls all the others."""
    directory, before = kept_in(), config.CACHE_DIR
    if directory is not None:
        name, module = function.__name__, function.__module__.rpartition(".")[2]
        if not any(directory.rglob(f"{module}.{name}-*.nbc")):
            logger.info("Compiling %s for this CPU, once; kept in %s.", name, directory)
        config.CACHE_DIR = str(directory)
        try:
            return cfunc(_SIGNATURE, cache=True, **_OPTIONS)(function)
        except Exception as error:  # a file cut off, a full disk: whatever numba then meets
            kind = type(error).__name__
            logger.warning("Cannot use machine code kept in %s (%s); compiling.", directory, kind)
        finally:
            config.CACHE_DIR = before
    return cfunc(_SIGNATURE, **_OPTIONS)(function)


def kept_in() -> Path | None:
    """The directory of what is compiled here, made if need be; None where there can be none."""
    if os.environ.get("VLLM_DISABLE_COMPILE_CACHE", "0") not in ("", "0"):
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path(caches, "vllm")).expanduser()
    directory = root / "vllm_svd" / digest()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return None
    ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return directory if ours and os.access(directory, os.W_OK) else None


def digest(package: Path = PACKAGE) -> str:
    """Of all on which machine code depends: our sources, the compiler, its settings, the CPU."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)} {path.stat().st_size} ".encode())
        found.update(path.read_bytes())
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    machine = cpu_target.target_context.codegen().magic_tuple()
    found.update(repr((sys.version, numba.__version__, machine, settings)).encode())
    return found.hexdigest()[:32]
