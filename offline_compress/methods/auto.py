"""The project's own method: for each matrix the artefact that loses least for its bytes.

The loss of an error E = W - W' is predicted as 1/2 tr(Y E C E^T) nats per token, with C = E[x x^T]
and Y = E[g g^T] of token-wise gradients (KFAC: Martens and Grosse, arXiv 1503.05671). Offers are

- codebooks (gptvq with exact feedback): C = R R^T, R upper, and rows of variance v, strip by strip,
  cost 1/2 sum_i Y_ii v_i sum_j R_jj^2 D(b), D the distortion of a Gaussian at b bits per weight;
- low rank in the Kronecker metric (gfwsvd) with int8 factors: 1/2 the dropped tail of L_Y^T W L_C;
- the dense matrix.

The allocator `knapsack` takes one offer per matrix. What is made then aims at the output of the
dense model on inputs x' of the model compressed so far: with H = E[x' x'^T] and
D = E[(x - x') x'^T], both centred, the target is W (I + D H^-1), as in SAES-SVD; the means go
into a bias, W E[x] - W' E[x'].
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.factors import LowRankInt8Factors
from offline_compress.linalg import cholesky
from offline_compress.linalg.hessian import damped_hessian
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.gfwsvd import Gfwsvd
from offline_compress.methods.gptvq import Gptvq
from offline_compress.methods.method import Compressed, Factorization, OfferingMethod
from vllm_svd.format import Codebook, LowRankInt8, Module

# Zador's constants of Gaussian sources in d dimensions, D ~ K 4^-b for many bits, and how D comes
# near them: a fit to Max's table of optimal scalar quantisers (IRE Trans. 6, 1960) within 4 %.
_ZADOR = {1: 2.72, 2: 2.02, 4: 1.62}
_APPROACH, _RATE = 1.28, 0.6
# int8 centroids: the largest is about four standard deviations, 127 steps away.
_INT8 = (4 / 127) ** 2 / 12
_LARGEST_INDEX = {1: 8, 2: 8, 4: 10}
_RANKS = 16  # offers of low rank per matrix, at least
_ALIGNED = 32  # ranks that tensor cores take whole


class Auto(OfferingMethod):
    """Mixes codebooks, int8 low-rank factors and dense matrices; `shift` 0 aims at W x' instead.

    `damping` is relative to the mean diagonal of H, and keeps text of another domain in sight. Of
    wiki-llama-xs at 0.2, KL to dense on the domain of the calibration and on Python, floor 0: at
    0.1 3.8e-4 and 2.5e-3, at 0.01 4.3e-4 and 4.2e-3; there without the shift 8.4e-4 and 7.7e-3.
    """

    paper: ClassVar[str] = "this project; parts as cited in offline_compress/methods/auto.py"
    when: ClassVar[str] = "always, unless a method is to be compared"
    artefact: ClassVar[str] = "codebooks, int8 factors or dense, by matrix, with a bias"
    allocator: ClassVar[str] = "knapsack"

    name: Literal["auto"] = "auto"
    shift: Annotated[float, Field(ge=0, le=1)] = 1.0
    damping: Annotated[float, Field(ge=0, le=1)] = 0.1

    @property
    def needs(self) -> Needs:
        return frozenset({"mean", "shifted_mean", "shifted_gram", "shift", "output_gram"})

    @property
    def menu_needs(self) -> Needs:
        return frozenset({"gram", "output_gram"})

    def offers(self, rows: int, columns: int, multiple: int = 1) -> Iterator[Module]:
        """Every artefact of a matrix [m, n] that is considered, bias correction included.

        Ranks are multiples of `multiple`, and of 32 where the matrix has so many.
        """
        for dim, largest in _LARGEST_INDEX.items():
            quantizer = Gptvq(dim=dim)
            for bits in range(dim, largest + 1):
                found = quantizer.sized(rows, columns, dim, bits)
                yield found.model_copy(update={"correction": True})
        smaller = min(rows, columns)
        step = smaller // (2 * _RANKS)
        step = step // _ALIGNED * _ALIGNED or step
        step = max(1, -(-step // multiple)) * multiple
        for rank in range(step, smaller // 2 + 1, step):
            yield LowRankInt8(out_features=rows, in_features=columns, rank=rank, correction=True)

    def menu(
        self,
        layer: Layer,
        path: str,
        weight: torch.Tensor,
        statistics: LayerStatistics,
        multiple: int = 1,
    ) -> list[tuple[Fraction, float]]:
        """(share of the dense bytes, predicted loss in nats per token) of every offer."""
        dense = layer.dense_bytes(path)
        spectrum = self._low_rank().spectrum(weight, statistics)
        tails = spectrum.sum() - spectrum.cumsum(0)
        rounding = 2 * _INT8 * spectrum.sum()
        codebook = _CodebookLoss(weight, statistics, self.damping)
        found = [(Fraction(1), 0.0)]
        for module in self.offers(*layer.shapes[path], multiple):
            share = Fraction(module.bytes(layer.item_bytes), dense)
            if share >= 1:
                continue
            if isinstance(module, Codebook):
                loss = codebook(module)
            else:
                assert isinstance(module, LowRankInt8)
                loss = float(tails[module.rank - 1] + rounding) / 2
            found.append((share, loss))
        return found

    def modules_at(
        self,
        layer: Layer,
        shares: Mapping[str, Fraction],
        multiple: int = 1,
    ) -> dict[str, Module | str]:
        """The offer of exactly this share, as the knapsack chose it, or the largest codebook below.

        Of codebooks of the same size that of more dimensions, which distorts less.
        """
        found: dict[str, Module | str] = {}
        for path, share in shares.items():
            if share >= 1:
                found[path] = "its share is all of it"
                continue
            offers = self.offers(*layer.shapes[path], multiple)
            sizes = [(offer.bytes(layer.item_bytes), offer) for offer in offers]
            limit = share * layer.dense_bytes(path)
            # Low rank only where it was chosen by its exact size: no size says when it is better.
            fitting = [
                (size, offer)
                for size, offer in sizes
                if size == limit or (size < limit and isinstance(offer, Codebook))
            ]
            order = [(size, getattr(offer, "dim", 0)) for size, offer in fitting or sizes]
            best = order.index(max(order) if fitting else min(order))
            found[path] = (fitting or sizes)[best][1]
        return found

    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        return Compressed(
            {
                path: self.approximate(block.weights[path], block.statistics[path], module)
                for path, module in wanted.items()
            }
        )

    def approximate(
        self, weight: torch.Tensor, statistics: LayerStatistics, module: Module
    ) -> Factorization:
        """W [m, n] as `module`; the loss is relative, against the shifted target under H."""
        seen, target = self._shifted(weight, statistics)
        if isinstance(module, Codebook):
            found = Gptvq(dim=None, damping=self.damping).quantize(target, seen, module)
        else:
            assert isinstance(module, LowRankInt8)  # of modules_at, never of a user
            found = self._low_rank().factorize(
                target, replace(seen, gram=seen.shifted_gram), module.rank
            )
            factors = found.factors
            int8 = LowRankInt8Factors.quantize(
                *balanced(factors.parts()["A"], factors.parts()["B"])
            )
            error = int8.output_error(target, seen.gathered("shifted_gram"))
            found = replace(found, factors=int8, loss=error)
        mean, there = statistics.gathered("mean"), statistics.gathered("shifted_mean")
        bias = weight.double() @ mean.double() - found.factors.dense() @ there.double()
        return replace(found, factors=replace(found.factors, correction=bias))

    def _low_rank(self) -> Gfwsvd:
        return Gfwsvd(input_shrinkage=0.0, output_shrinkage=0.01)

    def _shifted(
        self, weight: torch.Tensor, statistics: LayerStatistics
    ) -> tuple[LayerStatistics, torch.Tensor]:
        """Centred moments of x', and the target W (I + shift * D H^-1)."""
        mean = statistics.gathered("mean").double()
        there = statistics.gathered("shifted_mean").double()
        gram = statistics.gathered("shifted_gram").double()
        gram = gram - torch.outer(there, there)
        target = weight.double()
        shift = statistics.gathered("shift").double() - torch.outer(mean - there, there)
        if self.shift and shift.any() and gram.trace() > 0:
            factor, _ = cholesky(damped_hessian(gram, self.damping).matrix)
            moved = torch.cholesky_solve((target @ shift).T, factor).T
            target = target + self.shift * moved
        return replace(statistics, shifted_gram=gram, gram=gram), target


class _CodebookLoss:
    """Predicts what a codebook loses in nats per token, from the pivots of the Gram."""

    def __init__(self, weight: torch.Tensor, statistics: LayerStatistics, damping: float) -> None:
        gram = statistics.gathered("gram").double()
        if not gram.trace() > 0:
            self.pivots = 0.0  # never read: any error is free
        else:
            self.pivots = float(damped_hessian(gram, damping).factor.diagonal().square().sum())
        self.weight = weight.double()
        self.sensitivity = statistics.gathered("output_gram").double().diagonal()

    def __call__(self, module: Codebook) -> float:
        bits = module.index_bits / module.dim
        total = 0.0
        for start in range(0, len(self.weight), module.group_rows):
            rows = slice(start, start + module.group_rows)
            total += float(self.sensitivity[rows].sum() * self.weight[rows].square().mean())
        return total * self.pivots * (distortion(bits, module.dim) + _INT8) / 2


def distortion(bits: float, dim: int) -> float:
    """Mean squared error of an optimal quantiser of unit Gaussians, per component."""
    constant = 1 + (_ZADOR[dim] - 1) * (1 - _APPROACH * _RATE ** max(bits, 1))
    return float(constant * 4.0**-bits)


def balanced(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
    """The same product, with the same norm of each rank in both factors."""
    a, b = A.norm(dim=1), B.norm(dim=0)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return A * scale[:, None], B / scale
