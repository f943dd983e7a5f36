"""The work directory of a run: what was computed survives a kill, and the next run goes on."""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offline_compress.staging import OutputError, write_failure

_FACTS = "facts"


@dataclass(frozen=True)
class Workspace:
    """Named records of tensors and facts, each complete or absent."""

    directory: Path
    writable: bool = True

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Any = None) -> None:
        """Write a record; `facts` is anything JSON holds."""
        if not self.writable:
            return
        path = self._path(name)
        partial = path.with_suffix(".partial")
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, partial, metadata={_FACTS: json.dumps(facts)})
        partial.rename(path)

    def load(
        self, name: str, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, torch.Tensor], Any] | None:
        """A record, its tensors on the device, or None where there is none that can be read."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                facts = json.loads(file.metadata()[_FACTS])
                # Not by safe_open, to which a GPU without a number is the first, not this worker's.
                return {k: file.get_tensor(k).to(device) for k in file.keys()}, facts  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def read(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a record that is there."""
        with safe_open(self._path(name), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def work_root(out: Path) -> Path:
    """Where the work directories of runs that write `out` are."""
    return out.with_name(f".{out.name}.work")


@contextmanager
def workspace(out: Path, key: str, first: bool = True) -> Iterator[Workspace]:
    """The work directory of the run `key`: kept when the run is killed, removed when it ends.

    A run that fails of itself leaves nothing, but for one that could not write: what it finished
    waits for the same command. Raises OutputError for that, and if another process works in it.
    """
    directory = work_root(out) / key
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(out, error) from None
    if not first:  # another process of the same run holds the lock
        try:
            yield Workspace(directory, writable=False)
        except (OSError, SafetensorError) as error:
            raise write_failure(out, error) from None
        return
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"another run is writing {out} with the same recipe\n"
                "Remedy: wait for it, or choose another output directory"
            ) from None
        try:
            yield Workspace(directory)
        except (OutputError, OSError, SafetensorError) as error:
            failure = error if isinstance(error, OutputError) else write_failure(out, error)
            if any(directory.glob("*.safetensors")):
                _trim(directory)
                failure = OutputError(
                    f"{failure}\nWhat was computed waits in {directory.parent} for the same command"
                )
            else:
                _remove(directory)
            raise failure from None
        except Exception:
            _remove(directory)
            raise
        _remove(directory)


def forsaken(out: Path) -> dict[Path, int]:
    """Work directories for this output, in bytes: of runs that were killed, or are at work."""
    root = work_root(out)
    if not root.is_dir():
        return {}
    return {
        path: sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        for path in sorted(root.iterdir())
        if path.is_dir()
    }


def _trim(directory: Path) -> None:
    """Keep the records alone: hidden states and halves of records are of no use to another run."""
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            path.unlink()


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if directory.parent.is_dir() and not any(directory.parent.iterdir()):
        directory.parent.rmdir()
