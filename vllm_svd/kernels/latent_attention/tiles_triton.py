"""How many keys a program of latent_attention takes at once on CUDA."""

import functools

import torch
import triton

# Keys of a tile and stages of the pipeline that reads them: as tensor cores want them, then with
# less and less shared memory.
TILES = ((64, 3), (32, 3), (32, 1))
SPARE = 8 << 10  # bytes of shared memory for scales, pages and what crosses warps


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes beyond which Triton refuses a program; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 30
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def tile(
    query: torch.Tensor, k_padded: int, v_padded: int, rotary_dim: int, rows: int
) -> tuple[int, int]:
    """Keys and stages for which there is memory: for bases, queries, and the tiles in flight."""
    width, item = query.shape[2], query.element_size()
    fixed = k_padded * width * (rotary_dim > 0) + rows * width
    for keys, stages in TILES:
        of_key = max(1, stages - 1) * (k_padded + v_padded) + rotary_dim + rows
        if item * (fixed + keys * of_key) + SPARE <= shared_memory(query.device):
            break
    return keys, stages
