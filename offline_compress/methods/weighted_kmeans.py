"""k-means with a weight per coordinate: GPTVQ's codebooks (van Baalen et al., arXiv 2402.15319).

E: a(i) = argmin_c sum_j p_ij (x_ij - c_j)^2.  M: c_j = sum p_ij x_ij / sum p_ij over its points.
Seeds are equally spaced among the points sorted by Mahalanobis distance to their mean.
"""

import torch

_DISTANCES = 1 << 19  # at once: what fits in a cache
_TOLERANCE = 1e-4  # of what is lost: an iteration that gains less is the last
_RIDGE = 1e-9  # of the trace
_SERVED = 1e-5  # of a point's own energy: below are roundings of fp32


def weighted_kmeans(
    points: torch.Tensor, weights: torch.Tensor, count: int, iterations: int
) -> torch.Tensor:
    """Centroids [s, count, d] of s independent sets of points [s, g, v, d], in fp64.

    weights: p [v, d], not negative, shared by the sets and by the g rows of each. The scales of
    points and weights change nothing but the scale of the result.
    """
    size, unit = points.abs().amax((1, 2, 3), keepdim=True), weights.max()
    size, unit = (torch.where(found > 0, found, 1.0) for found in (size, unit))
    points, weights = points / size, weights / unit
    weighted = (points * weights).flatten(1, 2)
    # A distance but for sum p x^2 is a scalar product of features of the point and of the
    # centroid. In fp32: a tie that rounding decides costs 1e-7 of the point's energy.
    features = torch.cat([-2 * points * weights, weights.expand_as(points)], dim=3)
    features = features.flatten(1, 2).float()
    points = points.flatten(1, 2)
    energy = (weighted * points).sum(2)
    centroids = _seeds(points, count)
    before = float("inf")
    for _ in range(iterations):
        nearest, distance = _nearest(features, centroids)
        lost = distance.double() + energy
        lost[lost <= _SERVED * energy] = 0
        total = float(lost.sum())
        if total >= (1 - _TOLERANCE) * before:
            break
        centroids, used = _means(nearest, weighted, weights, centroids)
        centroids, reseeded = _reseed(centroids, used, points, lost)
        before = float("inf") if reseeded else total
    return centroids * size[..., 0]


def _nearest(features: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The centroid of each point [s, n], and the distance [s, n] but for the point's energy."""
    terms = torch.cat([centroids, centroids.square()], dim=2).mT.to(features.dtype)
    step = max(1, _DISTANCES // (terms.shape[0] * terms.shape[2]))
    found = [torch.min(piece @ terms, dim=2) for piece in torch.split(features, step, 1)]
    return (
        torch.cat([piece.indices for piece in found], dim=1),
        torch.cat([piece.values for piece in found], dim=1),
    )


def _means(
    nearest: torch.Tensor, weighted: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means [s, k, d], and which centroids have points [s, k].

    Coordinates without weight stay: those of centroids without points, and of padding.
    """
    (sets, count, dim), vectors = centroids.shape, len(weights)
    cells = (nearest + count * torch.arange(sets, device=nearest.device)[:, None]).flatten()
    vector = torch.arange(nearest.numel(), device=nearest.device) % vectors
    points = torch.bincount(cells * vectors + vector, minlength=sets * count * vectors)
    points = points.view(sets, count, vectors)
    mass = points.double() @ weights
    sums = [torch.bincount(cells, x.flatten(), sets * count) for x in weighted.unbind(2)]
    moment = torch.stack(sums, dim=1).view(sets, count, dim)
    return torch.where(mass > 0, moment / mass, centroids), points.sum(2) > 0


def _reseed(
    centroids: torch.Tensor, used: torch.Tensor, points: torch.Tensor, lost: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Move centroids without points to the points that lose most, one each.

    With no more distinct points than centroids it is this that finds all of them.
    """
    idle = ~used
    most = min(int(idle.sum(1).max()), points.shape[1])
    if not most:
        return centroids, False
    worst = lost.topk(most, dim=1)
    turn = (idle.cumsum(1) - 1).clamp(0, most - 1)
    move = idle & (worst.values.gather(1, turn) > 0)
    chosen = worst.indices.gather(1, turn)[..., None].expand_as(centroids)
    return torch.where(move[..., None], points.gather(1, chosen), centroids), bool(move.any())


def _seeds(points: torch.Tensor, count: int) -> torch.Tensor:
    """Points [s, count, d] equally spaced in the order of their Mahalanobis distance."""
    centred = points - points.mean(1, keepdim=True)
    covariance = centred.mT @ centred / points.shape[1]
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    ridge = torch.where(trace > 0, _RIDGE * trace, 1.0)
    covariance = covariance + torch.diag_embed(ridge[:, None].expand(-1, points.shape[2]))
    distance = (torch.linalg.solve(covariance, centred.mT).mT * centred).sum(2)
    spaced = torch.linspace(0, points.shape[1] - 1, count, device=points.device).round().long()
    order = distance.argsort(dim=1, stable=True)[:, spaced]
    return points.gather(1, order[..., None].expand(-1, -1, points.shape[2]))
