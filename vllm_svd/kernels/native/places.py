"""Where in a slot the machine code finds the channels of tiers, as tables that it reads.

Importing this needs no numba.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_svd.codec import LARGEST
from vllm_svd.kernels.latent_layout import Run
from vllm_svd.kernels.native import LANES

_WINDOW = 4 * LANES  # bytes of a vector

# Rows of a table of 16 channels: byte, shift, mask, flip, middle, and how far its scale lies from
# the first one.
SPREAD_ROWS = 6


class Spread(NamedTuple):
    """For each 16 channels where their window of 64 bytes begins, and what each lane does."""

    begins: Any
    """int64 [vectors]."""
    tables: Any
    """int32 [vectors, SPREAD_ROWS, LANES]."""

    @property
    def reads(self) -> int:
        """Bytes that are read from the beginning of a slot on."""
        return int(self.begins.max()) + _WINDOW


def in_pairs(runs: Sequence[Run]) -> list[list[tuple[int, int]]] | None:
    """Channels of a latent, two by two, as native.pairs decodes them: a list per tier.

    None where a tier does not begin with a word of the slot, or ends within half of one.
    """
    found = []
    for run in runs:
        size = run.tier.code_bytes
        if run.codes % 4 or size % 2:
            return None
        parts = [run.channel + part * size for part in range(8 // run.tier.bits)]
        pairs: list[tuple[int, int]] = []
        for byte in range(0, size, 4):
            both = [(byte, byte + 1), (byte + 2, byte + 3)]
            if byte + 2 == size:
                both = both[:1]
            elif len(parts) > 1:
                both = [(byte, byte + 2), (byte + 1, byte + 3)]
            pairs += [(part + low, part + high) for low, high in both for part in parts]
        found.append(pairs)
    return found


def spread(runs: Sequence[Run]) -> Spread | None:
    """For native.spread; None where a tier is fp8, a window is too small, or scales lie apart."""
    first_scale = runs[0].scale
    if any(run.tier.store == "fp8_e4m3" or run.scale >= first_scale + LANES for run in runs):
        return None
    lanes = [(run, channel) for run in runs for channel in range(run.tier.channels)]
    begins = np.zeros(-(-len(lanes) // LANES), dtype=np.int64)
    tables = np.zeros((len(begins), SPREAD_ROWS, LANES), dtype=np.int32)
    for vector in range(len(begins)):
        here = lanes[vector * LANES : (vector + 1) * LANES]
        places = [run.codes + channel % run.tier.code_bytes for run, channel in here]
        begins[vector] = min(places)
        if max(places) - min(places) >= _WINDOW:
            return None
        for lane, ((run, channel), place) in enumerate(zip(here, places, strict=True)):
            bits, whole = run.tier.bits, run.tier.store == "int8"
            middle = 128.0 if whole else LARGEST[run.tier.store]
            tables[vector, :, lane] = (
                *(place - begins[vector], channel // run.tier.code_bytes * bits),
                *((1 << bits) - 1, 128 if whole else 0, np.float32(middle).view(np.int32)),
                run.scale - first_scale,
            )
    return Spread(begins, tables)
