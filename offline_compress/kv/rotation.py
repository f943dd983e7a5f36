"""Orthogonal rotations that give every channel of a tier the same energy."""

import math

import torch


def rotation(channels: int) -> torch.Tensor:
    """Orthogonal [channels, channels] in fp64, the same on every machine.

    The Kronecker product of Sylvester's Hadamard matrix for the powers of two in `channels` and of
    the discrete Hartley transform for what is left. The Hartley part mixes neighbours, whose
    energies are alike, the Hadamard part spreads over the whole tier; so the diagonal of R E R^T is
    constant for a power of two and nearly so otherwise, and sums of many channels are close to
    normally distributed: what a quantiser with one scale wants.
    """
    odd = channels // (channels & -channels)
    spread = torch.ones(1, 1, dtype=torch.float64)
    while len(spread) * odd < channels:
        spread = torch.cat([torch.cat([spread, spread], 1), torch.cat([spread, -spread], 1)])
    angles = torch.arange(odd, dtype=torch.float64) * (2 * math.pi / odd)
    phases = angles[:, None] * torch.arange(odd)
    together: torch.Tensor = torch.kron(spread, phases.cos() + phases.sin())
    return together / math.sqrt(channels)
