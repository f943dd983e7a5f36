"""Hidden states of the calibration set between two blocks, in memory or in a mapped file."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Host bytes of one stream; a larger one lives in a file of the work directory.
HOST_LIMIT = 16 << 30


class HiddenStates:
    """[samples, context, hidden] on the host, read and written in micro-batches.

    The first `calibration` samples are the calibration set, the others are held out. Above `limit`
    bytes the values live in a memory-mapped file in `directory`, which the system pages in and out.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        directory: Path,
        name: str,
        limit: int = HOST_LIMIT,
    ) -> None:
        elements = shape[0] * shape[1] * shape[2]
        self.path: Path | None = None
        if elements * dtype.itemsize > limit:
            self.path = directory / f"{name}.hidden"
            with self.path.open("wb") as file:  # a full disk now is an error, a write later SIGBUS
                os.posix_fallocate(file.fileno(), 0, elements * dtype.itemsize)
            flat = torch.from_file(str(self.path), shared=True, size=elements, dtype=dtype)
        else:
            flat = torch.empty(elements, dtype=dtype)
        self._values = flat.view(shape)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def context(self) -> int:
        """Tokens of a sample."""
        return int(self._values.shape[1])

    @property
    def bytes(self) -> int:
        return self._values.nbytes

    def read(self, rows: slice, device: torch.device) -> torch.Tensor:
        """A micro-batch on the device."""
        found = self._values[rows].to(device)
        return found.clone() if found.data_ptr() == self._values[rows].data_ptr() else found

    def write(self, rows: slice, hidden: torch.Tensor) -> None:
        self._values[rows] = hidden.detach().to(self._values)

    def remove(self) -> None:
        """Delete the file behind the values, if there is one; they must not be used again."""
        self._values = torch.empty(0, 0, 0)
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def micro_batches(start: int, stop: int, batch: int) -> Iterator[slice]:
    """Slices of at most `batch` samples."""
    for first in range(start, stop, batch):
        yield slice(first, min(first + batch, stop))
