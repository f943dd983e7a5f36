"""Vector-quantised matrices: indices are looked up into a dense tile that lives for one GEMM.

The work of a lookup does not depend on the number of tokens, and neither do its shapes: it runs
under torch.compile and in CUDA graphs. Any rows and columns of the matrix can be a rank's: it
holds the words, and the codebooks of the strips, that cover them.
"""

import torch
import torch.nn.functional as F  # noqa: N812

from vllm_svd.kernels.products import linear
from vllm_svd.quantization.matrix import Matrix, Parts, length, whole

TILE_ELEMENTS = 1 << 24
_WORD = 32


class CodebookMatrix(Matrix):
    """`indices`, `codebooks` and `scales` as vllm_svd.format.Codebook stores them."""

    @property
    def vectors(self) -> slice:
        """The vectors that cover this rank's columns."""
        return _covering(self.columns, self.module.dim)

    @property
    def words(self) -> slice:
        """The words of a row that hold the indices of these vectors."""
        bits, vectors = self.module.index_bits, self.vectors
        return _covering(slice(vectors.start * bits, vectors.stop * bits), _WORD)

    @property
    def strips(self) -> tuple[slice, slice]:
        """The strips of rows and of columns this rank's part lies in."""
        return (
            _covering(self.rows, self.module.group_rows),
            _covering(self.columns, self.module.group_columns),
        )

    def local(self) -> dict[str, tuple[slice, ...]]:
        centroids, dim = whole(1 << self.module.index_bits), whole(self.module.dim)
        return {
            "indices": (self.rows, self.words),
            "codebooks": (*self.strips, centroids, dim),
            "scales": self.strips,
        }

    def multiply(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        scales = parts["scales"][..., None, None]
        centroids = (parts["codebooks"] * scales).to(x.dtype).flatten(0, 2)
        width = length(self.vectors) * self.module.dim
        rows = length(self.rows)
        step = max(1, TILE_ELEMENTS // width)
        tiles = [
            linear(x, self.tile(slice(first, min(first + step, rows)), centroids, parts))
            for first in range(0, rows, step)
        ]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)

    def tile(self, rows: slice, centroids: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Dense [rows, columns] of `rows` of this rank's, from centroids [strips * K, dim]."""
        module, device = self.module, centroids.device
        row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
        vector = torch.arange(
            self.vectors.start, self.vectors.stop, dtype=torch.int32, device=device
        )
        row_strips, column_strips = self.strips
        row_strip = (row + self.rows.start) // module.group_rows - row_strips.start
        column_strip = vector * module.dim // module.group_columns - column_strips.start
        strip = row_strip[:, None] * length(column_strips) + column_strip
        first_bit = vector * module.index_bits - self.words.start * _WORD
        index = _unpack(parts["indices"][rows], first_bit, module.index_bits)
        dense = F.embedding(strip * (1 << module.index_bits) + index, centroids).flatten(1)
        first = self.columns.start - self.vectors.start * module.dim
        return dense[:, first : first + length(self.columns)]


def _unpack(words: torch.Tensor, first_bit: torch.Tensor, bits: int) -> torch.Tensor:
    """The `bits` wide fields [rows, k] that begin at `first_bit` [k] of streams [rows, words]."""
    word, shift = (first_bit // _WORD).long(), first_bit % _WORD
    here = (_WORD - shift).clamp(max=bits)  # of the field's bits, those in its first word
    low = (words.gather(1, word.expand(len(words), -1)) >> shift) & ((1 << here) - 1)
    if _WORD % bits == 0:
        return low
    word = (word + 1).clamp(max=words.shape[1] - 1)
    rest = words.gather(1, word.expand(len(words), -1)) & (((1 << bits) - 1) >> here)
    return low | (rest << here)


def _covering(part: slice, size: int) -> slice:
    """The blocks of `size` elements that cover `part`."""
    return slice(part.start // size, -(-part.stop // size))
