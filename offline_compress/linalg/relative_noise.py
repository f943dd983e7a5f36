"""What storing a latent in few bits adds to its error."""

from functools import cache

import torch

from vllm_svd.codec import stored
from vllm_svd.format import Store, Tier

_SAMPLES = 1 << 16


@cache
def relative_noise(store: Store, channels: int) -> float:
    """Mean squared error over mean square of normally distributed channels with one scale.

    Measured on a fixed sample; rotated tiers are close to normal. Widths are rounded down to a
    power of two, since the noise changes with the logarithm of the width only.
    """
    width = 1 << max(2, channels.bit_length() - 1)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(max(64, _SAMPLES // width), width, generator=generator)
    error = stored(sample, [Tier(channels=width, store=store)]) - sample
    return float(error.double().square().mean() / sample.double().square().mean())
