"""What a compression method is: a frozen config that compresses the matrices of one layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from offline_compress.calibration.statistics import GRADIENTS, SHIFTED, LayerStatistics, Needs
from offline_compress.factors import Factors, LowRankFactors
from offline_compress.kv.projection import KVBases
from offline_compress.linalg import Truncation
from offline_compress.methods.block import Block, Layer
from vllm_svd.format import Codebook, KVProjection, LowRank, Module, Reduced


@dataclass(frozen=True)
class Factorization:
    """A compressed matrix and what it loses.

    `loss` is tr(E M E^T) / tr(W M W^T) with E = W - W', in the metric M [n, n] that the method
    minimises, before rounding to the stored dtype. For svd_llm M is the Gram itself, without the
    damping, which is relative to its mean diagonal, and with `update` the shifted Gram. Methods of
    two metrics lose tr(Y E X E^T) / tr(Y W X W^T), both as damped and shrunk.
    """

    factors: Factors
    loss: float
    damping: float = 0.0


@dataclass(frozen=True)
class Compressed:
    """What became of a layer; `bases` where the method itself reduces the K/V cache."""

    matrices: Mapping[str, Factorization] = field(default_factory=dict)
    bases: KVBases | None = None


class Recovery(BaseModel):
    """`steps` of Adam over every B, then as many over every A; `lr` falls linearly to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: PositiveInt
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4


class Method(BaseModel, ABC):
    """A member of the recipe's union: pydantic, frozen, told apart by `name`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    paper: ClassVar[str]
    when: ClassVar[str]
    artefact: ClassVar[str]
    # The allocator that the method was published with.
    allocator: ClassVar[str] = "uniform"
    # Whether each matrix alone approximates the one it replaces, with the same inputs and outputs.
    separable: ClassVar[bool] = True
    # Whether `compress` reads the energies of queries and keys.
    reads_attention: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The moments that `compress` reads."""

    @property
    def needs_before(self) -> Needs:
        """The moments of the dense model that an allocator is told from, gradients aside."""
        return frozenset()

    @property
    def base_model(self) -> str | None:
        """The model, a directory or a hub id, that a delta is taken against."""
        return None

    @property
    def recovery(self) -> Recovery | None:
        """How the factors are fine-tuned once all layers are compressed, if they are."""
        return None

    @abstractmethod
    def modules_at(
        self, layer: Layer, shares: Mapping[str, Fraction], multiple: int = 1
    ) -> dict[str, Module | str]:
        """The artefact of every matrix within its share of its dense bytes, or why it stays dense.

        Ranks and sizes are rounded down to a multiple, at least one. A method that is not separable
        may move bytes between the matrices of a layer.
        """

    def projection_at(self, layer: Layer, shares: Mapping[str, Fraction]) -> KVProjection | None:  # noqa: ARG002
        """The reduced K/V cache that the method makes of the layer by itself, if it does."""
        return None

    @abstractmethod
    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        """Make the artefacts of `wanted`, in fp64 where they are not packed."""


class OfferingMethod(Method):
    """A method that makes several artefacts of a matrix and predicts what each would lose."""

    @property
    @abstractmethod
    def menu_needs(self) -> Needs:
        """The moments of the dense model that `menu` reads."""

    @property
    def needs_before(self) -> Needs:
        return self.menu_needs - GRADIENTS

    @abstractmethod
    def menu(
        self,
        layer: Layer,
        path: str,
        weight: torch.Tensor,
        statistics: LayerStatistics,
        multiple: int = 1,
    ) -> list[tuple[Fraction, float]]:
        """(share of the dense bytes, predicted loss in nats per token) of every artefact.

        Ranks are multiples of `multiple`.
        """


class LowRankMethod(Method):
    """A method that truncates each matrix by itself at a rank it is told."""

    artefact: ClassVar[str] = "two factors in the model's dtype"

    @property
    def needs_before(self) -> Needs:
        return self.needs - SHIFTED - GRADIENTS

    @abstractmethod
    def factorize(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int
    ) -> Factorization:
        """Approximate W [m, n] by B [m, rank] @ A [rank, n]."""

    @abstractmethod
    def spectrum(self, weight: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
        """What each rank adds [min(m, n)], descending, in fp64: truncation at r loses the rest.

        In the method's own metric and not normalised, so its sum is tr(W M W^T).
        """

    def rank_share(self, rows: int, columns: int, item_bytes: int) -> Fraction:  # noqa: ARG002
        """The fraction of the dense bytes of W [m, n] that one rank takes."""
        return Fraction(rows + columns, rows * columns)

    def modules_at(
        self, layer: Layer, shares: Mapping[str, Fraction], multiple: int = 1
    ) -> dict[str, Module | str]:
        return {
            path: low_rank_at(*layer.shapes[path], share, multiple)
            for path, share in shares.items()
        }

    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        found = {}
        for path, module in wanted.items():
            assert isinstance(module, LowRank)  # of modules_at, never of a user
            found[path] = self.factorize(block.weights[path], block.statistics[path], module.rank)
        return Compressed(found)


def low_rank_at(rows: int, columns: int, share: Fraction, multiple: int) -> LowRank | str:
    """The largest rank, a multiple, whose factors hold at most `share` of the parameters."""
    if share >= 1:
        return "its share is all of it"
    rank = rank_at(share, rows, columns)
    rank = max(multiple, rank - rank % multiple)
    factors, dense = rank * (rows + columns), rows * columns
    if factors >= dense:
        return f"factors of rank {rank} hold {factors} parameters, the matrix {dense}"
    return LowRank(out_features=rows, in_features=columns, rank=rank)


def rank_at(share: Fraction, rows: int, columns: int) -> int:
    """floor(share m n / (m + n)): the largest rank whose factors hold `share` of the parameters."""
    return int(share * rows * columns / (rows + columns))


def workspace_bytes(out_features: int, in_features: int, module: Module | None = None) -> int:
    """fp64 bytes that making the artefact of W [m, n] takes at most, beside W and its Gram.

    Five matrices of the shape of W (copies and errors of it, both factors) and six of a side
    squared (eigenvectors and LAPACK's workspace): the smaller one for factors, measured within
    twice the real peak; that of the inputs for codebooks, which are fitted in the Gram itself; the
    larger one for reduced modules, whose channels may be of either.
    """
    side = min(out_features, in_features)
    if isinstance(module, Codebook):
        side = in_features
    elif isinstance(module, Reduced):
        side = max(out_features, in_features)
    return 8 * (5 * out_features * in_features + 6 * side * side)


def projected(weight: torch.Tensor, truncation: Truncation, damping: float = 0.0) -> Factorization:
    """B = U and A = U^T W, the best factors whose output lies in the span of U [m, r].

    With U the left singular vectors of W S this is B = U, A = Sigma V^T S^-1 without the inverse,
    so S may be singular.
    """
    basis = truncation.basis
    factors = LowRankFactors(A=basis.T @ weight.double(), B=basis)
    return Factorization(factors, truncation.loss, damping)
