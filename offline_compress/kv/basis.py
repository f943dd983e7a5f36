"""The optimal rank-r projection of one head's channels under the metric of whatever reads them.

Minimise tr(M (I - P) C (I - P)^T) over P = up down of rank r, where C [d, d] is the second moment
of the cached vector and M [d, d] that of its readers (KQ-SVD, arXiv:2512.05916, solves the same
problem for keys). The objective is ||M^(1/2) (I - P) C^(1/2)||_F^2, so by Eckart-Young
M^(1/2) P C^(1/2) keeps the top eigenvectors U_r of M^(1/2) C M^(1/2), and the cost is the sum of
the dropped eigenvalues. Only the row space of P matters to the cache:

    down = orthonormal rows that span U_r^T M^(1/2),   N = rows that complete them to R^d
    up   = down^T + N^T (N C down^T) (down C down^T)^-1

`up` regresses the channels that were dropped on those that were kept. It is the least-squares
optimum for every metric once `down` is fixed, and at full rank N is empty, so up = down^T exactly.
"""

from collections.abc import Sequence

import torch

from offline_compress.kv.rotation import rotation
from offline_compress.linalg import relative_noise
from vllm_svd.errors import SvdError
from vllm_svd.format import Tier

# Below this fraction of its largest eigenvalue the metric says "calibration never read this
# direction"; held at the floor, such directions are ranked by their energy in C instead.
_METRIC_FLOOR = 1e-10
# Noise of one size under the metric is the larger the less a direction is read: at most 100 times.
_NOISY_METRIC_FLOOR = 1e-4
# Of the strongest channel: those below are weighted as if they had this much. Bases must fit into
# fp16.
_LEAST_ENERGY = 1e-8
# Fractions of mean(diag C). Never zero: a pivot made of rounding noise would pass the Cholesky.
_DAMPING = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


def solve(
    metric: torch.Tensor, second_moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [d, r], down [r, d]) in fp64 for M and C [d, d], each symmetric positive semidefinite.

    Bases of different ranks are nested: the rows of a smaller `down` are the first of a larger.
    Raises SvdError if an entry is not finite or C is indefinite.
    """
    metric, second_moment = _symmetric(metric, "metric"), _symmetric(second_moment, "second moment")
    root = _square_root(metric)
    _, directions = torch.linalg.eigh(root @ second_moment @ root)
    frame, _ = torch.linalg.qr(root @ directions.flip(-1))
    down, dropped = frame.mT[:rank], frame.mT[rank:]
    return down.mT + dropped.mT @ _regression(dropped, down, second_moment), down


def energies(metric: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Eigenvalues [d] of M^(1/2) C M^(1/2), descending: what each channel of solve_tiers holds."""
    metric, second_moment = _symmetric(metric, "metric"), _symmetric(second_moment, "second moment")
    values, _ = _principal(metric, second_moment)
    return values if metric.any() else torch.zeros_like(values)


def solve_tiers(
    metric: torch.Tensor,
    second_moment: torch.Tensor,
    tiers: Sequence[Tier],
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [d, r], down [r, d]) in fp64 of a latent whose channels are stored in `tiers`.

    The coordinates are orthonormal under M and uncorrelated, strongest first, so that tiers meet
    channels of like energy. M is held at a floor, higher than that of `solve`, whose space would
    otherwise be the same. Every tier is rotated (rotation.py), which levels the noise of its one
    scale: with channels i of energy l_i weighted by w_i before, the noise of the tier is in
    proportion to mean(w_i^2 l_i) sum(1 / w_i^2), by Cauchy and Schwarz least at w_i = l_i^(-1/4).
    A tier has a mean square of one, unless some of its channels hold nothing. `down` is rounded to
    `dtype` before `up` regresses on it: what rounding does to a latent is not lost. Raises SvdError
    like `solve`.
    """
    metric, second_moment = _symmetric(metric, "metric"), _symmetric(second_moment, "second moment")
    values, down = _principal(metric, second_moment)
    # What rounding leaves in channels that hold nothing is not scaled up without bound.
    floor = float(_LEAST_ENERGY * values[0])
    roots = values.clamp_min(floor).sqrt() if floor > 0 else torch.ones_like(values)
    rows, first = [], 0
    for tier in tiers:
        mine = slice(first, first + tier.channels)
        weights = (roots[mine] * roots[mine].mean()).rsqrt()
        rows.append(rotation(tier.channels).to(down) @ (weights[:, None] * down[mine]))
        first += tier.channels
    latent = torch.cat(rows).to(dtype).double()
    identity = torch.eye(len(metric), dtype=torch.float64)
    return _regression(identity, latent, second_moment), latent


def weighted_error(
    metric: torch.Tensor,
    second_moment: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    tiers: Sequence[Tier] = (),
) -> float:
    """tr(M E C E^T) / tr(M C) with E = I - up down; leading dimensions (heads) are summed over.

    With `tiers` also the noise of storing the latent: independent of it, of the same size in all
    channels of a tier.
    """
    metric, second_moment = metric.double(), second_moment.double()
    up, down = up.double(), down.double()
    error = torch.eye(metric.shape[-1], dtype=torch.float64) - up @ down
    lost = torch.sum((metric @ error) * (error @ second_moment))
    if tiers:
        held = torch.sum((down @ second_moment) * down, dim=-1)  # E[z^2], [..., r]
        read = torch.sum((metric @ up) * up, dim=-2)
        widths = [tier.channels for tier in tiers]
        for tier, energy, weight in zip(
            tiers, torch.split(held, widths, -1), torch.split(read, widths, -1), strict=True
        ):
            noise = relative_noise(tier.store, tier.channels) * energy.mean(-1, keepdim=True)
            lost = lost + torch.sum(noise * weight)
    total = torch.sum(metric * second_moment)
    return float(lost / total) if total > 0 else 0.0


def _symmetric(matrix: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(matrix).all():
        raise SvdError(
            f"the {name} of a head holds values that are not finite\n"
            "Remedy: collect the statistics again from a model whose activations are finite"
        )
    matrix = matrix.double()
    return (matrix + matrix.mT) / 2


def _principal(
    metric: torch.Tensor, second_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies [d], descending, and rows [d, d] of M-orthonormal, uncorrelated coordinates."""
    root = _square_root(metric, _NOISY_METRIC_FLOOR)
    largest = metric.diagonal().max()
    values, vectors = torch.linalg.eigh(root @ second_moment @ root)
    # root is of the metric over its largest eigenvalue; energies are in the metric's own units
    scale = torch.linalg.matrix_norm(metric, 2) if largest > 0 else torch.ones(())
    return values.flip(0).clamp_min(0) * scale, vectors.flip(-1).mT @ root * scale.sqrt()


def _square_root(metric: torch.Tensor, floor: float = _METRIC_FLOOR) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(metric)
    largest = eigenvalues[-1]
    if largest <= 0:  # nothing reads this head: every direction counts the same
        return torch.eye(len(metric), dtype=torch.float64)
    relative = (eigenvalues / largest).clamp_min(floor)
    root: torch.Tensor = (vectors * relative.sqrt()) @ vectors.mT
    return root


def _regression(
    dropped: torch.Tensor, down: torch.Tensor, second_moment: torch.Tensor
) -> torch.Tensor:
    """Coefficients [d - r, r] that predict `dropped @ k` from the latent `down @ k`."""
    cross = dropped @ second_moment @ down.mT
    kept = down @ second_moment @ down.mT
    scale = second_moment.diagonal().mean()
    if scale <= 0:  # a dead head has nothing to predict from
        return torch.zeros_like(cross)
    identity = torch.eye(len(kept), dtype=torch.float64)
    for damping in _DAMPING:
        factor, failed = torch.linalg.cholesky_ex(kept / scale + damping * identity)
        if not failed:
            solution: torch.Tensor = torch.cholesky_solve(cross.mT / scale, factor)
            return solution.mT
    raise SvdError(
        f"the second moment of a head is not positive semidefinite, even with {_DAMPING[-1]} of "
        "its mean diagonal added\nRemedy: collect the statistics again"
    )
