"""What was made of tensors may be kept as long as these hold what they held."""

from typing import NamedTuple

import torch


class Source(NamedTuple):
    """Tensors that something was made of: they themselves, their memory, writes to them."""

    tensors: tuple[torch.Tensor | None, ...]
    marks: tuple[tuple[int, int] | None, ...]

    @classmethod
    def of(cls, *tensors: torch.Tensor | None) -> "Source":
        return cls(tensors, tuple(map(_mark, tensors)))

    def holds(self, *tensors: torch.Tensor | None) -> bool:
        """Whether these are they, neither moved nor written to; writes to `.data` do not show."""
        for tensor, known, mark in zip(tensors, self.tensors, self.marks, strict=True):
            if tensor is not known or _mark(tensor) != mark:
                return False
        return True


def _mark(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
