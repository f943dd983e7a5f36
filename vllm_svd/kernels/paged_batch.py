"""Arguments that every kernel over a paged latent cache shares."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """A ragged batch: request i owns query tokens query_start_loc[i] to query_start_loc[i + 1].

    Its last query token stands at position seq_lens[i] - 1; position p lies in cache block
    block_table[i, p // block size], slot p % block size.
    Kernels keep what all layers of a step need of it by its identity.
    """

    query_start_loc: torch.Tensor
    """[requests + 1] int32."""
    seq_lens: torch.Tensor
    """[requests] int32: tokens in the cache, those of this step included."""
    block_table: torch.Tensor
    """[requests, blocks] int32."""
    num_tokens: int
    """Query tokens of this step; further rows of the query are padding."""


@dataclass(frozen=True)
class Rope:
    """The model's own table cos_sin [positions, rotary_dim] (cosines, then sines) and pairing.

    NeoX style rotates channel i with i + rotary_dim / 2, the other style 2i with 2i + 1; channels
    from rotary_dim on are not rotated.
    """

    cos_sin: torch.Tensor
    is_neox: bool
