"""Machine code of latent_store: the codec, one tier of one token and group at a time."""

import numpy as np
from numba import float32, int64, njit, types, uint8, void

from vllm_svd.format import STORES

FP8, INT8, INT4 = (STORES.index(store) for store in ("fp8_e4m3", "int8", "int4"))


@njit(nogil=True)
def _fp8(x):
    """Bits of the nearest e4m3, ties to even; |x| is at most 448 but for rounding."""
    bits = np.array([min(abs(x), np.float32(448))], dtype=np.float32).view(np.uint32)
    magnitude = np.int64(bits[0])
    if magnitude >= 0x3C800000:  # 2^-6: three bits of mantissa, a bias of 7 in place of 127
        code = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    else:
        code = np.int64(np.rint(min(abs(x), np.float32(448)) * np.float32(512)))
    return code + (128 if x < 0 else 0)


@njit(nogil=True)
def _level(x, largest):
    """The nearest value of a code of few bits."""
    return min(max(np.floor(x) + np.float32(0.5), -largest), largest)


@njit(nogil=True)
def _best(latent, byte, tried, scales, largest):
    """The scale of least squared error among so many from `byte` down."""
    best, least = byte, np.float32(np.inf)
    for lower in range(tried):
        candidate = max(byte - lower, 0)
        scale, error = scales[candidate], np.float32(0)
        for i in range(len(latent)):
            miss = _level(latent[i] / scale, largest) * scale - latent[i]
            error += miss * miss
        if error < least:
            best, least = candidate, error
    return best


@njit(nogil=True)
def _codes(latent, kind, scale, largest, out):
    """Codes of a tier to the bytes from out[0] on."""
    if kind == INT8:
        for i in range(len(latent)):
            level = min(max(np.rint(latent[i] / scale), -largest), largest)
            out[i] = np.uint8(np.int64(level) & 255)
        return
    if kind == FP8:
        for i in range(len(latent)):
            out[i] = np.uint8(_fp8(latent[i] / scale))
        return
    bits = 4 if kind == INT4 else 2
    size = len(latent) * bits // 8
    for i in range(size):
        packed = np.int64(0)
        for part in range(8 // bits):
            level = _level(latent[part * size + i] / scale, largest) + largest
            packed |= np.int64(level) << (part * bits)
        out[i] = np.uint8(packed)


@njit(
    void(
        types.Array(float32, 3, "C"),
        types.Array(int64, 1, "A"),
        types.Array(uint8, 4, "A"),
        types.Array(int64, 2, "C"),
        types.Array(float32, 2, "C"),
        types.Array(float32, 1, "C"),
        types.Array(float32, 1, "C"),
        types.Array(int64, 1, "C"),
    ),
    nogil=True,
)
def encode(latents, slots, cache, runs, bounds, scales, largest, tried):
    """latents [tokens, groups, rank] to the slots of cache [blocks, groups, size, width]."""
    tokens, groups, _ = latents.shape
    size = cache.shape[2]
    for token in range(tokens):
        slot = slots[token]
        if slot < 0:
            continue
        for group in range(groups):
            row = cache[slot // size, group, slot % size]
            for run in range(len(runs)):
                kind, first, count, codes, scale = runs[run]
                latent = latents[token, group, first : first + count]
                high, finite = np.float32(0), True
                for i in range(count):
                    finite = finite and np.isfinite(latent[i])
                    high = max(high, abs(latent[i]))
                if not finite:  # whatever the codes are, they are read as NaN
                    row[scale] = 255
                    continue
                byte = 0
                while high > bounds[kind, byte]:
                    byte += 1
                if tried[kind] > 1:
                    byte = _best(latent, byte, tried[kind], scales, largest[kind])
                _codes(latent, kind, scales[byte], largest[kind], row[codes:])
                row[scale] = byte
