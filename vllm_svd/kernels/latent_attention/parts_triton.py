"""Operands and results of latent_attention on CUDA that are cut as latents are (parts_of)."""

import triton
import triton.language as tl

from vllm_svd.kernels.latent_tiers_triton import channels_of


@triton.jit
def load_query(
    query_row,
    real,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The channels of queries [PADDED, rows] that meet a part of the key latent."""
    channel = channels_of(PADDED, WORDS)
    return tl.load(
        query_row[None, :] + FIRST + channel[:, None],
        mask=real[None, :] & (channel < CHANNELS)[:, None],
        other=0.0,
    )


@triton.jit
def load_up(
    up_ptr,
    row,
    real,
    row_stride,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The rows of one head's k_up [PADDED, rows] that rebuild from a part of the key latent."""
    channel = channels_of(PADDED, WORDS)
    return tl.load(
        up_ptr + FIRST + channel[:, None] + row[None, :] * row_stride,
        mask=(channel < CHANNELS)[:, None] & real[None, :],
        other=0.0,
    )


@triton.jit
def zeros(ROWS: tl.constexpr, PADDED: tl.constexpr):
    """The accumulator of a part of the value latent."""
    return tl.zeros([PADDED, ROWS], tl.float32)


@triton.jit
def store_output(
    output_row,
    real,
    output,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write the channels that a part of the value latent holds."""
    channel = channels_of(PADDED, WORDS)
    tl.store(
        output_row[None, :] + FIRST + channel[:, None],
        output.to(output_row.dtype.element_ty),
        mask=real[None, :] & (channel < CHANNELS)[:, None],
    )
