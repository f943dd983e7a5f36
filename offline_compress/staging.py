"""A directory that appears complete, by one rename, or not at all."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_svd.errors import SvdError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_open: set[Path] = set()  # for a signal, which ends the process without unwinding the stack


class OutputError(SvdError):
    """An output directory that cannot be written."""


def ensure_vacant(out: Path) -> None:
    """Raises OutputError if `out` exists, or cannot be created with its parents."""
    if not out.name:
        raise OutputError(f"{out} already exists\nRemedy: give the name of a new directory")
    try:
        _partial(out).exists()  # the longest name that will be written
        taken = out.exists() or out.is_symlink()
    except OSError as error:
        raise OutputError(
            f"{out} cannot be created: {error.strerror}\nRemedy: choose a shorter name"
            if error.errno == errno.ENAMETOOLONG
            else f"{out} cannot be created: {error}\nRemedy: choose an output directory elsewhere"
        ) from None
    if taken:
        raise OutputError(
            f"{out} already exists\nRemedy: choose another output directory, or remove this one"
        )
    ground = _ground(out)
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        what = "writable" if ground.is_dir() else "a directory"
        raise OutputError(f"{ground} is not {what}\nRemedy: choose an output directory elsewhere")


def ensure_room(out: Path, needed: int) -> None:
    """Raises OutputError if the file system of `out` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(_ground(out)).free
    if free < needed:
        raise OutputError(_too_full(out, needed, free))


def leftovers(out: Path) -> dict[Path, int]:
    """Directories that other runs began to write for `out`, killed or still at work, in bytes."""
    try:
        return {
            path: sum(file.stat().st_size for file in path.iterdir())
            for path in sorted(out.parent.iterdir())
            if path.name.startswith(f".{out.name}.") and path.name.endswith(".partial")
        }
    except OSError:  # no such parent, or one of them was finished just now
        return {}


def abandon() -> None:
    """Remove every directory that is still being written; the process is about to end."""
    for partial in _open:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """A hidden sibling directory to write in; it becomes `out` when the block succeeds.

    Missing parents of `out` are created and, being empty, left if it does not.

    Whatever ends the block early, an interrupt included, removes the directory. A failed write
    raises OutputError, with the bytes needed where the file system is full.
    """
    ensure_vacant(out)
    ensure_room(out, needed)
    partial = _partial(out)
    _open.add(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise write_failure(out, error, needed) from None
        raise
    finally:
        _open.discard(partial)


def _ground(out: Path) -> Path:
    """The nearest parent of `out` that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")


def write_failure(out: Path, error: OSError | SafetensorError, needed: int = 0) -> OutputError:
    """What a failed write of `out` means: a full file system, with the bytes needed, or else."""
    # safetensors gives the number only in its text
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else said and int(said[1])
    if number in _FULL:
        free = shutil.disk_usage(_ground(out)).free
        return OutputError(f"{_too_full(out, needed, free)}\nCause: {error}")
    return OutputError(
        f"{out} cannot be written: {error}\n"
        "Remedy: see to that, or choose an output directory elsewhere"
    )


def _too_full(out: Path, needed: int, free: int) -> str:
    needs = f"it needs {needed:,} bytes and" if needed else "the disk is full,"
    return (
        f"{out} cannot be written: {needs} {free:,} are free there\n"
        "Remedy: free that much space, or choose an output directory on another file system"
    )
