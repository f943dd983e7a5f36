"""Vector-quantised weights: packed indices into int8 codebooks with one scale each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offline_compress.factors.factors import Factors
from vllm_svd.format import Codebook

_WORD = 32  # bits


@dataclass(frozen=True)
class CodebookFactors(Factors):
    """W [m, n] as vllm_svd.format.Codebook stores it.

    `indices` [m, words] int32 packed, `codebooks` [row groups, column groups, k, dim] int8 and
    `scales` [row groups, column groups] fp32.
    """

    indices: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor
    in_features: int
    group_rows: int
    group_columns: int

    @property
    def index_bits(self) -> int:
        return int(self.codebooks.shape[2]).bit_length() - 1

    def dense(self) -> torch.Tensor:
        dim = self.codebooks.shape[3]
        chosen = unpacked(self.indices, self.config().vectors, self.index_bits)
        rows, vectors = (torch.arange(size, device=chosen.device) for size in chosen.shape)
        groups = (rows // self.group_rows)[:, None], vectors * dim // self.group_columns
        centroids = self.codebooks[(*groups, chosen)].double()
        centroids *= self.scales.double()[groups][..., None]
        return centroids.flatten(1)[:, : self.in_features]

    def config(self) -> Codebook:
        return Codebook(
            out_features=len(self.indices),
            in_features=self.in_features,
            dim=self.codebooks.shape[3],
            index_bits=self.index_bits,
            group_rows=self.group_rows,
            group_columns=self.group_columns,
            correction=self.correction is not None,
        )

    def parts(self) -> dict[str, torch.Tensor]:
        return {"indices": self.indices, "codebooks": self.codebooks, "scales": self.scales}

    @classmethod
    def of_parts(cls, config: Codebook, parts: Mapping[str, torch.Tensor]) -> "CodebookFactors":
        return cls(
            parts["indices"],
            parts["codebooks"],
            parts["scales"],
            config.in_features,
            config.group_rows,
            config.group_columns,
        )


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [m, ceil(v * bits / 32)] of the values [m, v] below 2**bits, the first value in
    the lowest bits of the first word.
    """
    count = values.shape[1]
    word, offset = _positions(count, bits, values.device)
    shifted = values.long() << offset
    # Fields do not overlap, so sums are unions. A value may reach into one word more.
    words = values.new_zeros(len(values), -(-count * bits // _WORD) + 1, dtype=torch.long)
    words.index_add_(1, word, shifted & 0xFFFFFFFF)
    words.index_add_(1, word + 1, shifted >> _WORD)
    return words[:, :-1].to(torch.int32)  # keeps the low 32 bits


def unpacked(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """The `count` values [m, count] in int64 that `packed` made the words of."""
    word, offset = _positions(count, bits, words.device)
    unsigned = words.long() & 0xFFFFFFFF
    following = torch.cat([unsigned[:, 1:], unsigned.new_zeros(len(unsigned), 1)], dim=1)
    # Two words are at most 63 bits here: bits <= 12 leaves the sign alone.
    both = unsigned[:, word] | (following[:, word] & ((1 << bits) - 1)) << _WORD
    return (both >> offset) & ((1 << bits) - 1)


def _positions(count: int, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The word in which each value begins, and its lowest bit there."""
    first = torch.arange(count, device=device) * bits
    return first // _WORD, first % _WORD
