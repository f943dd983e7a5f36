"""Dobi-SVD: Wang et al., "Dobi-SVD: Differentiable SVD for LLM Compression", ICLR 2025, arXiv
2502.02723. Truncates the outputs a = W x of a layer, and stores the factors in 8 bits.

W_new = U U^T W with U [m, r] the leading eigenvectors of W C W^T = E[a a^T]: no other projection
of rank r loses less of the outputs of all calibration batches together. The published code takes
the right singular vectors of each batch's outputs, drops their singular values, and runs an
incremental PCA, mean-centred, over the vectors of all batches. That average is a heuristic: every
direction that a batch keeps counts the same, whether it holds most of the batch's energy or a
millionth. The minimiser is SVD-LLM's closed form. Perplexities of LLaMA-7B on WikiText-2 at 0.8
kept, in two 16-bit factors: 8.87 of the average and 8.54 once the ranks were trained too (both as
quoted in arXiv 2604.01609), 7.94 of the closed form at uniform ranks (arXiv 2403.07378).

Remapping: of the SVD W_new = P diag(sigma) Q^T the longer side carries sigma. Both sides are 8-bit,
one scale per singular vector and side, but for the |m - n| rows of the longer side beyond the
shorter's length, which keep the model's dtype. Rank r then takes r max(m, n) items of 16 bits
instead of r (m + n): every rank up to min(m, n) has a size below the dense one, and none is lost.
Published ratios leave the scales out; here they are counted, 8 bytes a rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar, Literal

import torch

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.factors import LowRankInt8Factors
from offline_compress.linalg import Truncation, eigh, left_of_gram, left_of_matrix, spectrum_of
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.method import Compressed, Factorization, LowRankMethod, projected
from vllm_svd.format import LowRank, LowRankInt8, Module


class DobiSvd(LowRankMethod):
    """Optimal at its rank for the calibration outputs; `remap` stores more ranks in fewer bits."""

    paper: ClassVar[str] = "Wang et al., ICLR 2025, arXiv 2502.02723"
    when: ClassVar[str] = "bytes matter more than multiplications: 8-bit factors, most ranks kept"
    artefact: ClassVar[str] = "two int8 factors with a 16-bit tail"
    allocator: ClassVar[str] = "learned"

    name: Literal["dobi_svd"] = "dobi_svd"
    remap: bool = True

    @property
    def needs(self) -> Needs:
        return frozenset({"gram"})

    def rank_share(self, rows: int, columns: int, item_bytes: int) -> Fraction:
        if not self.remap:
            return super().rank_share(rows, columns, item_bytes)
        return Fraction(_one_rank(rows, columns).bytes(item_bytes), rows * columns * item_bytes)

    def modules_at(
        self, layer: Layer, shares: Mapping[str, Fraction], multiple: int = 1
    ) -> dict[str, Module | str]:
        """With `remap` the rank counts real bytes and may exceed the break-even of two factors."""
        if not self.remap:
            return super().modules_at(layer, shares, multiple)
        return {
            path: remapped_at(*layer.shapes[path], share, multiple, layer.item_bytes)
            for path, share in shares.items()
        }

    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        found = {}
        for path, module in wanted.items():
            assert isinstance(module, LowRank | LowRankInt8)  # of modules_at, never of a user
            found[path] = self.factorize(block.weights[path], block.statistics[path], module.rank)
        return Compressed(found)

    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """The metric of the loss is the Gram; rounding to 8 bits comes after it."""
        gram = statistics.gathered("gram").double()
        kept = output_subspace(weight, gram, rank)
        if not self.remap:
            return projected(weight, kept)
        return Factorization(remapped(weight, kept.basis), kept.loss)

    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        rows, columns = weight.shape
        gram, double = statistics.gathered("gram").double(), weight.double()
        if rows <= columns:
            return eigh(double @ gram @ double.T).values
        return spectrum_of(double @ _root(gram))


def output_subspace(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Truncation:
    """Leading eigenvectors U [m, rank] of W C W^T, for W [m, n] and the Gram C [n, n].

    A tall W has them from W S [m, n] with S S^T = C; a singular C is as good as another. Inputs
    never seen alive say nothing: plain truncation, which loses nothing that was seen.
    """
    double = weight.double()
    if not gram.trace() > 0:
        return replace(left_of_matrix(double, rank), loss=0.0)
    if weight.shape[0] <= weight.shape[1]:
        return left_of_gram(double @ gram.double() @ double.T, rank)
    return left_of_matrix(double @ _root(gram), rank)


def remapped_at(
    rows: int, columns: int, share: Fraction, multiple: int, item_bytes: int
) -> LowRankInt8 | str:
    """The largest rank, a multiple, whose 8-bit factors take at most `share` of the dense bytes."""
    if share >= 1:
        return "its share is all of it"
    one = _one_rank(rows, columns)
    dense = rows * columns * item_bytes
    rank = min(rows, columns, int(share * dense / one.bytes(item_bytes)))
    rank = max(multiple, rank - rank % multiple)
    if rank > min(rows, columns):
        return f"a rank of {rank}, the least multiple, exceeds the matrix [{rows}, {columns}]"
    stored = rank * one.bytes(item_bytes)
    if stored >= dense:
        return f"8-bit factors of rank {rank} take {stored} bytes, the matrix {dense}"
    return one.model_copy(update={"rank": rank})


def _one_rank(rows: int, columns: int) -> LowRankInt8:
    return LowRankInt8(
        out_features=rows,
        in_features=columns,
        rank=1,
        a_tail=max(0, columns - rows),
        b_tail=max(0, rows - columns),
    )


def remapped(weight: torch.Tensor, basis: torch.Tensor) -> LowRankInt8Factors:
    """The singular vectors of U U^T W in 8 bits, for W [m, n] and orthonormal U [m, r].

    With P the eigenvectors of A A^T [r, r], A = U^T W, they are U P and the rows of P^T A, which
    are sigma Q^T: nothing is divided but a row by its own norm.
    """
    rows, columns = weight.shape
    inner = basis.T @ weight.double()
    turn = eigh(inner @ inner.T).vectors
    left, right = basis @ turn, turn.T @ inner
    if rows > columns:
        sigma = right.norm(dim=1)
        left, right = left * sigma, right / sigma.where(sigma > 0, 1)[:, None]
    return LowRankInt8Factors.quantize(
        right, left, a_tail=max(0, columns - rows), b_tail=max(0, rows - columns)
    )


def _root(gram: torch.Tensor) -> torch.Tensor:
    """Q sqrt(Lambda) [n, n] of a Gram that may be singular."""
    values, vectors = eigh(gram)
    return vectors * values.sqrt()
