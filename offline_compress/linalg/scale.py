"""Scales of channels that a method may divide by."""

import torch

_FLOOR = 1e-3  # of the median: a channel that the data never excited keeps some weight


def floored(scale: torch.Tensor) -> torch.Tensor:
    """Scales [n] in fp64 of one channel each, all positive; ones where all of them are zero."""
    double = scale.double()
    floor = _FLOOR * double.median()
    if not floor > 0:  # most channels are dead
        floor = _FLOOR * double.mean()
    return double.clamp_min(floor) if floor > 0 else torch.ones_like(double)
