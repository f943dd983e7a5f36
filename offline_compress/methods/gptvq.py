"""GPTVQ: van Baalen et al., "The Blessing of Dimensionality", arXiv 2402.15319.

min tr((W - Q) H (W - Q)^T), H = C + damping, Q [m, n] made of centroids of d columns, one codebook
of 2^bits of them for each strip of rows and block of columns: weighted k-means on weights that
earlier errors have moved, feedback vector by vector, codebooks by least squares, then int8. Beyond
the paper, coordinate descent on the assignments before int8 (`sweeps`, 0 leaves it out).
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch.nn import functional

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.factors.codebook import CodebookFactors, packed
from offline_compress.linalg.hessian import Hessian, damped_hessian
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.codebook_update import rounded, updated
from offline_compress.methods.coordinate_descent import descended, sweep
from offline_compress.methods.error_feedback import fed_back, vectors_of
from offline_compress.methods.method import Compressed, Factorization, Method
from offline_compress.methods.strips import Strips, energy, strips_of
from offline_compress.methods.weighted_kmeans import weighted_kmeans
from vllm_svd.format import Codebook, Module

Dim = Literal[1, 2, 4]

# The largest codebooks: 256 scalars or pairs fit a lookup in registers, 4096 quadruples (16 KiB)
# a multiprocessor's shared memory; the format itself ends at 12 bits.
INDEX_BITS: dict[Dim, int] = {1: 8, 2: 8, 4: 12}


class Objectives(NamedTuple):
    """tr(E H E^T) / tr(W H W^T), H damped, after each stage.

    nearest: k-means and the nearest centroid, no vector knowing of another. feedback: what
    assigning one after the other makes of it. update, then descent: never above the one before.
    int8: what is stored; rounding may raise it, as the steps of the codebooks are coarse, and the
    last sweep, over rounded centroids, takes back what it can.
    """

    nearest: float
    feedback: float
    update: float
    descent: float
    int8: float


class _Stored(NamedTuple):
    strips: Strips
    int8: torch.Tensor
    scales: torch.Tensor


class Gptvq(Method):
    """Codebooks instead of factors: the fewest bytes at equal quality, below 4 bits a weight.

    dim: columns of a centroid; null takes for each matrix the one that gives it most bits.
    index_bits: bits of an index, fewer where the share of a matrix is too small for them; null
    takes as many as fit. group_rows: rows of a strip; null as few as keep the codebooks below
    `overhead` bits per weight. em_iterations: at most, of k-means. damping: of the mean diagonal
    of H. update_steps: of conjugate gradients. sweeps: over all assignments, each followed by an
    update. sequential: H is that of the inputs in the compressed model.
    """

    paper: ClassVar[str] = "van Baalen et al., arXiv 2402.15319"
    when: ClassVar[str] = "few bytes matter more than few operations: 2 to 4 bits a weight"
    artefact: ClassVar[str] = "int8 codebooks and packed indices"

    name: Literal["gptvq"] = "gptvq"
    dim: Dim | None = 2
    index_bits: Annotated[int, Field(ge=1, le=12)] | None = None
    em_iterations: NonNegativeInt = 100
    damping: Annotated[float, Field(ge=0, le=1)] = 0.01
    group_columns: Annotated[int, Field(ge=1)] = 256
    group_rows: PositiveInt | None = None
    overhead: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.125
    update_steps: NonNegativeInt = 25
    sweeps: NonNegativeInt = 4
    sequential: bool = True

    @model_validator(mode="after")
    def _fits_the_format(self) -> "Gptvq":
        for dim in self._dims:
            if self.group_columns % dim:
                raise ValueError(
                    f"group_columns {self.group_columns} is no multiple of dim {dim}: "
                    f"take {-(-self.group_columns // dim) * dim}"
                )
        if self.dim and self.index_bits and self.index_bits > INDEX_BITS[self.dim]:
            raise ValueError(
                f"index_bits {self.index_bits} exceeds {INDEX_BITS[self.dim]}, the most for "
                f"dim {self.dim}: lower it or choose another dim of 1, 2, 4"
            )
        return self

    @property
    def _dims(self) -> tuple[Dim, ...]:
        return (self.dim,) if self.dim else (1, 2, 4)

    @property
    def needs(self) -> Needs:
        return frozenset({"shifted_gram"}) if self.sequential else frozenset({"gram"})

    def modules_at(
        self,
        layer: Layer,
        shares: Mapping[str, Fraction],
        multiple: int = 1,  # noqa: ARG002
    ) -> dict[str, Module | str]:
        return {
            path: self.codebook_at(*layer.shapes[path], share, layer.item_bytes)
            for path, share in shares.items()
        }

    def codebook_at(
        self, rows: int, columns: int, share: Fraction, item_bytes: int
    ) -> Codebook | str:
        """The most bits per weight, then the larger dim, within a share of the dense bytes.

        Where none fits, the fewest bytes; or, as a reason, that these are no fewer than the dense.
        """
        if share >= 1:
            return "its share is all of it"
        dense = rows * columns * item_bytes
        offers = [self.sized(rows, columns, dim, bits) for dim, bits in self._sizes()]
        fitting = [offer for offer in offers if offer.bytes(item_bytes) <= share * dense]
        if fitting:
            return max(
                fitting, key=lambda offer: (Fraction(offer.index_bits, offer.dim), offer.dim)
            )
        least = min(offers, key=lambda offer: offer.bytes(item_bytes))
        if least.bytes(item_bytes) >= dense:
            return f"a codebook takes {least.bytes(item_bytes)} bytes, the matrix {dense}"
        return least

    def _sizes(self) -> Iterator[tuple[Dim, int]]:
        for dim in self._dims:
            largest = min(self.index_bits or INDEX_BITS[dim], INDEX_BITS[dim])
            for bits in range(1, largest + 1):
                yield dim, bits

    def sized(self, rows: int, columns: int, dim: int, bits: int) -> Codebook:
        """Codebooks of 2^bits centroids for as few rows each as the overhead allows."""
        group_rows = self.group_rows
        if group_rows is None:
            codebook = 8 * dim * 2**bits + 32  # bits, with its scale
            blocks = -(-columns // self.group_columns)
            strips = int(self.overhead * rows * columns / (blocks * codebook))
            group_rows = -(-rows // max(1, strips))
        return Codebook(
            out_features=rows,
            in_features=columns,
            dim=dim,
            index_bits=bits,
            group_rows=min(group_rows, rows),
            group_columns=self.group_columns,
        )

    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        found = {}
        for path, module in wanted.items():
            assert isinstance(module, Codebook)  # of modules_at, never of a user
            found[path] = self.quantize(block.weights[path], block.statistics[path], module)
        return Compressed(found)

    def quantize(
        self, weight: torch.Tensor, statistics: LayerStatistics, module: Codebook
    ) -> Factorization:
        """W [m, n] as codebooks, already as they are stored.

        The metric of the loss is the Gram without damping, or the identity where calibration saw
        nothing. The method's own dim, index_bits and groups play no part: `module` has them.
        """
        gram = statistics.gathered("shifted_gram" if self.sequential else "gram").double()
        if not gram.trace() > 0:
            gram = torch.eye(len(gram)).to(gram)
        hessian = damped_hessian(gram, self.damping)
        padded = _padded(hessian, module)
        indices, codebooks, scales = [], [], []
        for weights in strips_of(weight, module):
            *_, (found, int8, scale) = self._stages(weights, padded, module)
            indices.append(packed(found.indices.flatten(0, 1), module.index_bits))
            codebooks.append(int8)
            scales.append(scale)
        factors = CodebookFactors(
            torch.cat(indices),
            torch.cat(codebooks),
            torch.cat(scales),
            module.in_features,
            module.group_rows,
            module.group_columns,
        )
        return Factorization(factors, factors.output_error(weight, gram), hessian.damping)

    def objectives(self, weight: torch.Tensor, gram: torch.Tensor, module: Codebook) -> Objectives:
        """What each stage of `quantize` makes of the objective, for W [m, n] and C [n, n]."""
        hessian = _padded(damped_hessian(gram, self.damping), module)
        alone = hessian._replace(factor=vectors_of(hessian.factor, module.dim))
        total, lost = 0.0, torch.zeros(len(Objectives._fields), dtype=torch.float64)
        for weights in strips_of(weight, module):
            *stages, stored = self._stages(weights, hessian, module)
            total += float(energy(weights, hessian.matrix).sum())
            found = [self._fed_back(weights, alone, module), *stages, stored.strips]
            lost += torch.stack(
                [energy(weights - stage.dense(), hessian.matrix).sum() for stage in found]
            ).cpu()
        return Objectives(*(lost / total if total > 0 else lost).tolist())

    def _stages(
        self, weights: torch.Tensor, hessian: Hessian, module: Codebook
    ) -> tuple[Strips, Strips, Strips, _Stored]:
        """Strips [s, g, n] after feedback, update and descent, and what is stored of them."""
        metric = hessian.matrix
        feedback = self._fed_back(weights, hessian, module)
        update = updated(weights, metric, feedback, self.update_steps)
        descent = descended(weights, metric, update, self.sweeps, self.update_steps)
        int8, scales = rounded(weights, metric, descent)
        stored = descent.with_codebooks(int8 * scales.double()[..., None, None])
        if self.sweeps:
            stored = sweep(weights, metric, stored)
        return feedback, update, descent, _Stored(stored, int8, scales)

    def _fed_back(self, weights: torch.Tensor, hessian: Hessian, module: Codebook) -> Strips:
        dim, width = module.dim, module.group_columns // module.dim
        precisions = hessian.precisions.view(-1, dim)

        def codebooks_of(first: int, moved: torch.Tensor) -> torch.Tensor:
            points = moved.reshape(*moved.shape[:2], -1, dim)
            here = precisions[first : first + width]
            return weighted_kmeans(points, here, 1 << module.index_bits, self.em_iterations)

        return fed_back(weights, hessian.factor, dim, width, codebooks_of)


def _padded(hessian: Hessian, module: Codebook) -> Hessian:
    """With zeros for the columns that fill the last vector: what they hold costs nothing."""
    more = module.vectors * module.dim - module.in_features
    if not more:
        return hessian
    matrix, factor = (functional.pad(x, (0, more, 0, more)) for x in hessian[:2])
    precisions = functional.pad(hessian.precisions, (0, more))
    return Hessian(matrix, factor, precisions, hessian.damping)
