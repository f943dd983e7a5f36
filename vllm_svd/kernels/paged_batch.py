"""Arguments that every kernel over a paged latent cache shares."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """A ragged batch: request i owns query tokens query_start_loc[i] to query_start_loc[i + 1].

    Its last query token stands at position seq_lens[i] - 1; position p lies in cache block
    block_table[i, p // block size], slot p % block size.
    Told from others by its identity: see once_per_batch.
    """

    query_start_loc: torch.Tensor
    """[requests + 1] int32."""
    seq_lens: torch.Tensor
    """[requests] int32: tokens in the cache, those of this step included."""
    block_table: torch.Tensor
    """[requests, blocks] int32."""
    num_tokens: int
    """Query tokens of this step; further rows of the query are padding."""
    max_query_len: int
    """Query tokens of any request, at most: kernels reserve memory for so many."""


class Rope(NamedTuple):
    """The model's own table cos_sin [positions, rotary_dim] (cosines, then sines) and pairing.

    NeoX style rotates channel i with i + rotary_dim / 2, the other style 2i with 2i + 1; channels
    from rotary_dim on are not rotated.
    """

    cos_sin: torch.Tensor
    is_neox: bool


def once_per_batch(derive: Callable[[PagedBatch], T]) -> Callable[[PagedBatch], T]:
    """Keep what `derive` gives in the batch itself: the layers of a step share a batch."""
    name = f"{derive.__module__}.{derive.__qualname__}"

    @functools.wraps(derive)
    def derived(batch: PagedBatch) -> T:
        known = batch.__dict__
        found: T | None = known.get(name)
        if found is None:
            found = known[name] = derive(batch)
        return found

    return derived
