"""Stored latents: codes of few bits with a scale per token, group and tier.

A scale is one byte b and stands for 2^((b - 128) / 8); b = 255 stands for a latent that is not
finite, and makes what is read from it NaN. The value of a code is the scale times

    int8      the integer, -127 to 127
    fp8_e4m3  the number
    int4      nibble - 7.5   (byte j of w / 2: channel j in the low bits, w / 2 + j in the high)
    int2      crumb - 1.5    (byte j of w / 4: channels j, w / 4 + j, ... from the low bits up)

so that 4 and 2 bits have no code for zero, which with so few levels costs more than it gives.
The scale of 8 bits is the smallest that clips nothing, that of fewer bits the one of least squared
error among it and the next smaller ones: outliers are clipped where that pays.
"""

import math
from collections.abc import Sequence

import torch

from vllm_svd.format import STORES, Store, Tier

SCALE_STEPS = 8  # scales per octave
SCALE_ZERO = 128
NOT_FINITE = 255
# Of a code: the largest magnitude, and how many scales are tried: one octave, or two.
LARGEST: dict[Store, float] = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.5, "int2": 1.5}
TRIED: dict[Store, int] = {"fp8_e4m3": 1, "int8": 1, "int4": 8, "int2": 16}


def scale_of(byte: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """2^((b - 128) / 8) of scale bytes, NaN for 255."""
    exponent = (byte.to(torch.float64) - SCALE_ZERO) / SCALE_STEPS
    return torch.where(byte == NOT_FINITE, math.nan, torch.exp2(exponent)).to(dtype)


def scales() -> torch.Tensor:
    """[256] fp32: what each scale byte stands for."""
    return scale_of(torch.arange(256))


def bounds() -> torch.Tensor:
    """[STORES, 256] fp32: the largest magnitude that each scale byte does not clip.

    The bytes whose bound a magnitude exceeds count up to its own byte, without a logarithm. 254 has
    no bound: it takes all that is larger.
    """
    largest = torch.tensor([LARGEST[store] for store in STORES], dtype=torch.float64)
    exact = largest[:, None] * scale_of(torch.arange(256), torch.float64)
    rounded = exact.float()
    above = rounded.double() > exact
    rounded = torch.where(above, rounded.nextafter(torch.zeros(())), rounded)
    rounded[:, NOT_FINITE - 1 :] = torch.inf
    return rounded


def encode(latent: torch.Tensor, tiers: Sequence[Tier]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., bytes] and scales [..., tiers], both uint8, of a latent [..., rank]."""
    parts = torch.split(latent.float(), [tier.channels for tier in tiers], dim=-1)
    encoded = [_encode(part, tier.store) for part, tier in zip(parts, tiers, strict=True)]
    codes, scales = zip(*encoded, strict=True)
    return torch.cat(codes, dim=-1), torch.cat(scales, dim=-1)


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    tiers: Sequence[Tier],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The latent [..., rank] of codes [..., bytes] and scales [..., tiers]."""
    parts = torch.split(codes, [tier.code_bytes for tier in tiers], dim=-1)
    latents = [
        _levels(part, tier.store, dtype) * scale_of(scales[..., i : i + 1], dtype)
        for i, (part, tier) in enumerate(zip(parts, tiers, strict=True))
    ]
    return torch.cat(latents, dim=-1)


def stored(latent: torch.Tensor, tiers: Sequence[Tier]) -> torch.Tensor:
    """What is read of a latent [..., rank] that was written, in its dtype; itself without tiers."""
    if not tiers:
        return latent
    return decode(*encode(latent, tiers), tiers).to(latent.dtype)


def _encode(latent: torch.Tensor, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
    largest = latent.abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    exponent = torch.ceil(SCALE_STEPS * torch.log2(largest.double() / LARGEST[store]))
    unclipped = (torch.where(finite, exponent, 0) + SCALE_ZERO).clamp(0, NOT_FINITE - 1)
    tried = unclipped - torch.arange(TRIED[store], device=latent.device)
    tried = tried.clamp_min(0).to(torch.uint8)
    best = tried[..., :1]
    if TRIED[store] > 1:
        scales = scale_of(tried)[..., None]
        read = _integers(latent[..., None, :] / scales, store) * scales
        errors = (read - latent[..., None, :]).square().sum(dim=-1)
        best = tried.gather(-1, errors.argmin(dim=-1, keepdim=True))
    codes = _codes(latent / scale_of(best), store)
    return codes, torch.where(finite, best, NOT_FINITE).to(torch.uint8)


def _integers(x: torch.Tensor, store: Store) -> torch.Tensor:
    """The nearest value of a code of 4 or 2 bits."""
    largest = LARGEST[store]
    return (x.floor() + 0.5).clamp(-largest, largest)


def _codes(x: torch.Tensor, store: Store) -> torch.Tensor:
    """Bytes of values that are divided by their scale."""
    if store == "fp8_e4m3":
        return x.nan_to_num(0).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if store == "int8":
        return x.nan_to_num(0).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    levels = (_integers(x.nan_to_num(0), store) + LARGEST[store]).to(torch.uint8)
    bits = 4 if store == "int4" else 2
    parts = levels.chunk(8 // bits, dim=-1)
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (bits * i))
    return packed


def _levels(codes: torch.Tensor, store: Store, dtype: torch.dtype) -> torch.Tensor:
    """Values of the codes, before their scale."""
    if store == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).to(dtype)
    if store == "int8":
        return codes.view(torch.int8).to(dtype)
    bits = 4 if store == "int4" else 2
    parts = [(codes >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=-1).to(dtype) - LARGEST[store]
