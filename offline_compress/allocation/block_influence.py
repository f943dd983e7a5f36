"""Layers that change the hidden state least lose most: MoDeGPT, Lin et al., ICLR 2025.

arXiv 2408.09632, its global sparsity allocation. The influence of a layer is that of ShortGPT (Men
et al., arXiv 2403.03853): s_l = 1 - E cos(x_l, x_l+1). Of L layers, phi_l is removed with

    phi_l = L phi_mean softmax(-s / eps)_l,

which minimises sum_l phi_l (s_l + eps log phi_l). Under a cap, and summed over the n_l parameters
of each layer, the minimum is phi_l = min(max_removed, c exp(-s_l / eps)), with c such that exactly
sum_l n_l phi_l = (1 - kept) sum_l n_l.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from offline_compress.allocation.allocator import Allocator, Asks, Evidence, Shares
from vllm_svd.errors import SvdError


class BlockInfluence(Allocator):
    """Every matrix of a layer keeps the same share.

    The influence is taken as measured: it has no unit, and scaling it to a range would give eps
    another meaning in every model, and spread layers apart that are equally important.
    """

    paper: ClassVar[str] = "Lin et al., ICLR 2025, arXiv 2408.09632; Men et al., arXiv 2403.03853"

    name: Literal["block_influence"] = "block_influence"
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    max_removed: Annotated[float, Field(gt=0, lt=1)] = 0.8

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset({"influence"})

    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        """Raises SvdError if no layer may lose as much as all must on average."""
        cap = Fraction(str(self.max_removed))
        if 1 - kept > cap:
            raise SvdError(
                f"weights.kept {float(kept):g} removes {float(1 - kept):g} of the parameters; "
                f"block_influence removes at most max_removed {self.max_removed:g} of a layer\n"
                f"Remedy: set weights.kept to {float(1 - cap):g} or more, or raise "
                "weights.allocator.max_removed"
            )
        assert evidence.influence is not None
        sizes: dict[int, int] = defaultdict(int)
        for matrix in evidence.matrices.values():
            sizes[matrix.layer] += matrix.size
        influence = {layer: evidence.influence[layer] for layer in sizes}
        broken = [str(layer) for layer, value in influence.items() if not math.isfinite(value)]
        if broken:
            raise SvdError(
                f"the hidden states of decoder layers {', '.join(broken)} are not finite\n"
                "Remedy: check the checkpoint for damaged weights"
            )
        removed = _removed(sizes, influence, 1 - kept, cap, self.eps)
        return {path: 1 - removed[matrix.layer] for path, matrix in evidence.matrices.items()}


def _removed(
    sizes: Mapping[int, int],
    influence: Mapping[int, float],
    mean: Fraction,
    cap: Fraction,
    eps: float,
) -> dict[int, Fraction]:
    """phi per layer, whose mean weighted by `sizes` is exactly `mean`."""
    removed: dict[int, Fraction] = {}
    budget = mean * sum(sizes.values())
    free = set(sizes)
    while free:
        # Measured from the least of those left, the exponentials cannot all underflow.
        least = min(influence[layer] for layer in free)
        weights = {layer: Fraction(math.exp((least - influence[layer]) / eps)) for layer in free}
        scale = budget / sum(sizes[layer] * weights[layer] for layer in free)
        capped = {layer for layer in free if scale * weights[layer] > cap}
        if not capped:
            removed |= {layer: scale * weights[layer] for layer in free}
            break
        removed |= dict.fromkeys(capped, cap)
        budget -= cap * sum(sizes[layer] for layer in capped)
        free -= capped
    return removed
