"""Codebooks with the assignments fixed: least squares, then 8 bits.

tr((W - A(c)) H (W - A(c))^T) is quadratic in all codebooks c at once, with gradient
2 A^T((A(c) - W) H). GPTVQ (arXiv 2402.15319, 3.3) descends it with Adam; conjugate gradients with
exact steps never raise it, and need no learning rate.
"""

import torch

from offline_compress.methods.strips import Strips

# Of the first residual, in the norm that the preconditioner makes: what is left to gain is about
# its square of what was gained.
_TOLERANCE = 1e-2
_LARGEST = 127
# Of the largest entry. Steps a little wider may fall where a small codebook is; narrower ones clip
# an outlier, which may cost less than coarse steps for all others.
_REACHES = (1.0, 1.01, 1.02, 0.95, 0.9, 0.8, 0.7)


def updated(weights: torch.Tensor, hessian: torch.Tensor, found: Strips, steps: int) -> Strips:
    """Codebooks of lower or equal tr(E H E^T), for each strip on its own.

    weights: [s, g, n] and H [n, n], fp64. The preconditioner is the sum of H_jj over the weights
    of each centroid's coordinate; centroids without weights, or only dead ones, stay.
    """
    codebooks = found.codebooks
    diagonal = found.adjoint(hessian.diagonal().expand_as(weights).contiguous())
    scale = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    residual = found.adjoint((weights - found.dense()) @ hessian)
    direction = scale * residual
    norm = first = (residual * direction).sum((1, 2, 3))
    for _ in range(steps):
        if bool((norm <= _TOLERANCE**2 * first).all()):
            break
        curved = found.adjoint(found.with_codebooks(direction).dense() @ hessian)
        step = _ratio(norm, (direction * curved).sum((1, 2, 3)))
        codebooks = codebooks + step * direction
        residual = residual - step * curved
        after = (residual * scale * residual).sum((1, 2, 3))
        direction = scale * residual + _ratio(after, norm) * direction
        norm = after
    return found.with_codebooks(codebooks)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """One factor per strip, for codebooks [s, b, k, d]; zero where a strip is done."""
    return torch.where(below > 0, above / below, 0.0)[:, None, None, None]


def rounded(
    weights: torch.Tensor, hessian: torch.Tensor, found: Strips
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codebooks [s, b, k, d] and their fp32 scales [s, b], symmetric.

    Block after block of columns takes the scale with the lowest tr(E H E^T), given the rounding
    of the blocks before: the change is exact, not a proxy.
    """
    codebooks = torch.where(_used(found)[..., None], found.codebooks, 0.0)
    gradient = (found.dense() - weights) @ hessian
    int8 = torch.empty_like(codebooks, dtype=torch.int8)
    scales = codebooks.new_empty(codebooks.shape[:2], dtype=torch.float32)
    span = found.width * codebooks.shape[3]
    for block in range(codebooks.shape[1]):
        columns = slice(block * span, (block + 1) * span)
        own = hessian[columns, columns]
        vectors = slice(block * found.width, (block + 1) * found.width)
        exact = codebooks[:, block : block + 1]
        best: tuple[torch.Tensor, ...] | None = None
        for reach in _REACHES:
            steps, scale = _to_int8(exact, reach)
            moved = steps * scale.double()[:, None, None, None] - exact
            delta = Strips(moved, found.indices[..., vectors], found.width).dense()
            change = ((2 * gradient[..., columns] + delta @ own) * delta).sum((1, 2))
            tried = (change, steps, scale, delta)
            best = tried if best is None else _lower(best, tried)
        assert best is not None
        _, steps, scales[:, block], delta = best
        int8[:, block] = steps[:, 0].to(torch.int8)
        gradient += delta @ hessian[columns]
    return int8, scales


def _to_int8(codebooks: torch.Tensor, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole steps [s, 1, k, d] in fp64 and the fp32 scale [s]; codebooks of zeros have scale 1."""
    largest = reach * codebooks.abs().amax((1, 2, 3)) / _LARGEST
    scale = largest.float()
    scale = torch.where(scale > 0, scale, 1.0)
    steps = (codebooks / scale.double()[:, None, None, None]).round()
    return steps.clamp(-_LARGEST, _LARGEST), scale


def _lower(
    best: tuple[torch.Tensor, ...], tried: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Per strip, the one of the two with the lower first entry."""
    better = tried[0] < best[0]
    return tuple(
        torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
        for old, new in zip(best, tried, strict=True)
    )


def _used(found: Strips) -> torch.Tensor:
    """Which centroids have vectors [s, b, k]."""
    shape = found.codebooks.shape[:3]
    return torch.bincount(found.cells.flatten(), minlength=shape.numel()).view(shape) > 0
