"""Greedy allocation on measured sensitivity: bytes go where the predicted loss falls most per byte.

loss_i(r) = d_i tail_i(r) / tail_i(r_ref), tail_i(r) = sum_{j>r} of spectrum i [min(m, n)], and 0 if
dense, with d_i the measured rise of the calibration loss when only matrix i is truncated at r_ref:
the error model of LEMS (Thoma et al., ICML 2026) without its propagation bias. The budget is spent
along the lower convex hulls of the curves, which is optimal wherever a step of a hull ends (Fox,
Management Science 13(3), 1966; Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988, for hulls): there
the Lagrangian's one price per byte holds for all matrices. A hull may step from a low rank to the
dense matrix, past the break-even rank whose factors cost as much and still lose something.
"""

import math
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from offline_compress.allocation.allocator import LOSS_WINDOWS, Asks, Evidence, Shares
from offline_compress.allocation.budget import Budget, BudgetedAllocator, Parameters
from offline_compress.allocation.greedy import fill

# A loss of output energy too small for the calibration loss to show it.
_INTANGIBLE = 1e-6


class WaterFilling(BudgetedAllocator):
    """Every matrix keeps `floor` of the uniform share; the rest goes where it helps most.

    `reference` is the share of the measurement, by default what is kept. With `measure` false
    every matrix counts by its relative tail energy, and nothing is measured. A floor of 0.5 beat
    0.3 on wiki-llama-s at 0.8, 0.6 and 0.4 kept (perplexity 41.41, 41.92, 44.29 against 41.55,
    42.26, 44.95; uniform 42.05, 43.69, 50.29).
    """

    paper: ClassVar[str] = "Fox 1966 and Shoham and Gersho 1988, on the error model of LEMS, 2026"

    name: Literal["water_filling"] = "water_filling"
    floor: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    measure: bool = True
    reference: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"spectra", "losses"}) if self.measure else frozenset({"spectra"})

    def windows_read(self, matrices: int) -> int:
        return LOSS_WINDOWS * (1 + matrices) if self.measure else 0

    def held(self, kept: Fraction, budget: Budget, evidence: Evidence) -> Parameters:
        floors = budget.within(dict.fromkeys(budget.sizes, Fraction(str(self.floor)) * kept))
        curves = {}
        for path, losses in self._losses(kept, budget, evidence).items():
            step, dense = budget.sizes[path]
            sizes = torch.arange(floors[path], dense, step)
            ranks = sizes // (step // evidence.rank_multiple)
            known = losses[ranks.clamp_max(len(losses) - 1)]
            curves[path] = [*zip(sizes.tolist(), known.tolist(), strict=True), (dense, 0.0)]
        return fill(curves, budget.parameters)

    def _losses(
        self, kept: Fraction, budget: Budget, evidence: Evidence
    ) -> dict[str, torch.Tensor]:
        """Predicted loss of every matrix by rank, from 0: nats where measured."""
        assert evidence.spectra is not None
        tails = {path: _tail(evidence.spectra[path]) for path in budget.sizes}
        if not self.measure:
            return {path: tail / tail[0] if tail[0] > 0 else tail for path, tail in tails.items()}
        wanted = kept if self.reference is None else Fraction(str(self.reference))
        at, references = {}, {}
        for path, sizes in budget.sizes.items():
            width = sizes.step // evidence.rank_multiple
            tangible = int((tails[path] > _INTANGIBLE * tails[path][0]).sum()) - 1
            size = sizes.within(min(wanted, Fraction(tangible * width, sizes.dense)))
            if size < sizes.dense and size // width <= tangible:
                at[path], references[path] = sizes.share(size), tails[path][size // width]
        rises = _measured(at, evidence)
        return {
            path: rises[path] * (tail / references[path]) if path in at else torch.zeros_like(tail)
            for path, tail in tails.items()
        }


def _measured(at: Shares, evidence: Evidence) -> dict[str, float]:
    """What each matrix alone at its share adds to the calibration loss, positive and finite.

    A rise that is not positive is noise and counts as the least of the others; one that is not
    finite, as the largest.
    """
    assert evidence.loss is not None
    total = 1 + len(at)
    evidence.progress("sensitivity", 0, total)
    dense = evidence.loss({})
    evidence.progress("sensitivity", 1, total)
    rises = {}
    for done, (path, share) in enumerate(at.items(), 2):
        rises[path] = evidence.loss({path: share}) - dense
        evidence.progress("sensitivity", done, total)
    credible = [rise for rise in rises.values() if 0 < rise < math.inf] or [1.0]
    least, largest = min(credible), max(credible)
    return {
        path: max(rise, least) if math.isfinite(rise) else largest for path, rise in rises.items()
    }


def _tail(spectrum: torch.Tensor) -> torch.Tensor:
    """What truncation at rank r loses, for r = 0 ... len(spectrum)."""
    tail = spectrum.double().flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])
