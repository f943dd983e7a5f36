"""MLPs in MoDeGPT: Nystroem's approximation, a selection of channels and a refit.

Of the channels z [n] that down [m, n] reads, C = E[z z^T], the k with the largest ridge leverage
diag(C (C + ridge I)^-1) stay: S, as rows of gate and up. With D the others, down becomes
    W' = W_S + W_D C_DS (C_SS + ridge)^-1  [m, k],
for no ridge the least-squares refit W C_:S C_SS^-1, which minimises E||W z - W' z_S||^2.
"""

import torch

from offline_compress.factors.reduced import ReducedFactors
from offline_compress.linalg import cholesky, floored, regressed
from offline_compress.methods.block import Block
from offline_compress.methods.method import Factorization


def reduce_mlp(
    block: Block, gate: str, up: str, down: str, kept: int, ridge: float, refit_ridge: float
) -> dict[str, Factorization]:
    """The matrices of a gated MLP with `kept` channels; the loss of all is down's output error."""
    shapes, weight = block.layer.shapes, block.weights[down].double()
    gram = block.statistics[down].gathered("gram").double()
    called = bool(gram.trace() > 0)  # calibration may never reach an expert
    scores = leverage(gram, ridge) if called else weight.square().sum(0)
    channels = scores.argsort(descending=True, stable=True)[:kept].sort().values
    refit, damping = refitted(weight, gram, channels, refit_ridge)
    factors = ReducedFactors.of(refit, shapes[down], columns=channels)
    loss = factors.output_error(weight, gram)
    found = {down: Factorization(factors, loss, damping)}
    for path in (gate, up):
        rows = block.weights[path].double()[channels]
        found[path] = Factorization(ReducedFactors.of(rows, shapes[path], rows=channels), loss)
    return found


def leverage(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """diag(C (C + ridge I)^-1) [n], the ridge relative to the mean diagonal of C [n, n]."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(gram, cholesky(damped).factor).diagonal()


def refitted(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, float]:
    """W' [m, k] for the channels `kept` [k], and its relative damping.

    The ridge is relative to the energy of each channel, so that one of outliers does not drown the
    others. It only shrinks the regression: what stays of W stays as it is.
    """
    others = torch.ones(len(gram), dtype=torch.bool, device=gram.device).index_fill(0, kept, 0)
    dropped = others.nonzero()[:, 0]
    among_kept = gram[kept[:, None], kept]
    scale = floored(among_kept.diagonal().sqrt())
    correlation = among_kept / scale / scale[:, None]
    correlation.diagonal().add_(ridge)
    cross = weight[:, dropped] @ gram[dropped[:, None], kept] / scale
    found = regressed(cross, correlation)
    return weight[:, kept] + found.coefficients / scale, ridge + found.damping
