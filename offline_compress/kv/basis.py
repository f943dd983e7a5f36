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

import torch

from vllm_svd.errors import SvdError

# Below this fraction of its largest eigenvalue the metric says "calibration never read this
# direction"; held at the floor, such directions are ranked by their energy in C instead.
_METRIC_FLOOR = 1e-10
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


def weighted_error(
    metric: torch.Tensor, second_moment: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> float:
    """tr(M E C E^T) / tr(M C) with E = I - up down; leading dimensions (heads) are summed over."""
    metric, second_moment = metric.double(), second_moment.double()
    error = torch.eye(metric.shape[-1], dtype=torch.float64) - up.double() @ down.double()
    lost = torch.sum((metric @ error) * (error @ second_moment))
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


def _square_root(metric: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(metric)
    largest = eigenvalues[-1]
    if largest <= 0:  # nothing reads this head: every direction counts the same
        return torch.eye(len(metric), dtype=torch.float64)
    relative = (eigenvalues / largest).clamp_min(_METRIC_FLOOR)
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
