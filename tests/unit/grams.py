"""Random matrices and Grams of correlated inputs."""

import torch


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(width, correlation=0.9, outlier=1.0):
    """Neighbouring inputs are correlated; one channel is larger than the others."""
    place = torch.arange(width, dtype=torch.float64)
    gram = correlation ** (place[:, None] - place).abs()
    scale = torch.ones(width, dtype=torch.float64)
    scale[width // 3] = outlier
    return scale[:, None] * gram * scale
