"""Vector by vector, what an assignment loses is made up for in the columns not yet assigned.

GPTQ's feedback for vectors (van Baalen et al., arXiv 2402.15319, algorithm 1), but with the
coupling inside a vector, which the published update drops: an error E of the columns P moves the
columns F after them by -E (H^-1_PP)^-1 H^-1_PF. With R of linalg.hessian the same is
W_F + E R_PF R_FF^-1, and no column is moved before its turn: what the earlier errors E and a
centroid c make of P costs ||(W_P - c) R_PP + E R_before,P||^2. These costs add up to tr(E H E^T).
"""

from collections.abc import Callable

import torch

from offline_compress.methods.strips import Strips

# Codebooks [s, k, d] for the block of columns that begins with this vector, of its moved weights.
CodebooksOf = Callable[[int, torch.Tensor], torch.Tensor]


def fed_back(
    weights: torch.Tensor, factor: torch.Tensor, dim: int, width: int, codebooks_of: CodebooksOf
) -> Strips:
    """Assign the weights [s, g, n], all strips at once, blocks of `width` vectors one by one.

    factor: R [n, n], upper. n is a multiple of dim; columns of padding are zeros in both. All in
    fp64: the costs are differences of large numbers where a row or a channel is huge.
    """
    span = dim * width
    errors = torch.zeros_like(weights)
    codebooks, indices = [], []
    for start in range(0, weights.shape[2], span):
        stop = min(start + span, weights.shape[2])
        block = factor[start:stop, start:stop]
        carried = errors[..., :start] @ factor[:start, start:stop]
        found = codebooks_of(start // dim, weights[..., start:stop] + _solved(carried, block))
        targets = weights[..., start:stop] @ vectors_of(block, dim) + carried
        for first in range(start, stop, dim):
            here, local = slice(first, first + dim), slice(first - start, first - start + dim)
            own = block[local, local]
            target = targets[..., local] + errors[..., start:first] @ factor[start:first, here]
            images = found @ own
            # |t - i|^2 without |t|^2, which is the same for all.
            cost = torch.baddbmm(images.square().sum(2)[:, None], target, images.mT, alpha=-2)
            chosen = cost.argmin(2)
            centroids = found.gather(1, chosen[..., None].expand(-1, -1, dim))
            errors[..., here] = weights[..., here] - centroids
            indices.append(chosen)
        codebooks.append(found)
    return Strips(torch.stack(codebooks, dim=1), torch.stack(indices, dim=2), width)


def _solved(carried: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """carried R^-1: by how much the earlier errors move the weights of a block [.., c]."""
    real = int((block.diagonal() > 0).sum())  # columns of padding are last
    moved = torch.zeros_like(carried)
    moved[..., :real] = torch.linalg.solve_triangular(
        block[:real, :real], carried[..., :real], upper=True, left=False
    )
    return moved


def vectors_of(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """R [n, n] with only the d x d blocks on its diagonal: no vector knows of another."""
    vector = torch.arange(len(factor), device=factor.device) // dim
    return factor * (vector[:, None] == vector)
