"""A directory that appears complete, by one rename, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_svd.errors import SvdError

_open: set[Path] = set()  # for a signal, which ends the process without unwinding the stack


class OutputError(SvdError):
    """An output directory that cannot be written."""


def ensure_vacant(out: Path) -> None:
    """Raises OutputError if `out` exists or its parent does not."""
    if out.exists() or out.is_symlink():
        raise OutputError(
            f"{out} already exists\nRemedy: choose another output directory, or remove this one"
        )
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is not a directory\nRemedy: mkdir -p {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise OutputError(
            f"{out.parent} is not writable\nRemedy: choose an output directory elsewhere"
        )


def ensure_room(out: Path, needed: int) -> None:
    """Raises OutputError if the file system of `out` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OutputError(_too_full(out, needed, free))


def abandon() -> None:
    """Remove every directory that is still being written; the process is about to end."""
    for partial in _open:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """A hidden sibling directory to write in; it becomes `out` when the block succeeds.

    Whatever ends the block early, an interrupt included, removes the directory. A failed write
    raises OutputError with the bytes needed.
    """
    ensure_vacant(out)
    ensure_room(out, needed)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    _open.add(partial)
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            free = shutil.disk_usage(out.parent).free
            raise OutputError(f"{_too_full(out, needed, free)}\nCause: {error}") from None
        raise
    finally:
        _open.discard(partial)


def _too_full(out: Path, needed: int, free: int) -> str:
    return (
        f"{out} cannot be written: it needs {needed:,} bytes and {free:,} are free there\n"
        "Remedy: free that much space, or choose an output directory on another file system"
    )
