"""Assignments improved one vector at a time, all others fixed; codebooks in between.

The feedback of GPTQ sees only the columns before a vector, coordinate descent sees all (QuantEase,
Behdin et al., arXiv 2309.01885, for scalars). With g the gradient ((Q - W) H)_P, a centroid c in
place of q changes tr(E H E^T) by (c - q) H_PP (c - q)^T + 2 g (c - q)^T, exactly.
"""

from dataclasses import replace

import torch

from offline_compress.methods.codebook_update import updated
from offline_compress.methods.strips import Strips


def descended(
    weights: torch.Tensor, hessian: torch.Tensor, found: Strips, sweeps: int, steps: int
) -> Strips:
    """Alternate a sweep over all vectors with `steps` of the codebooks; nothing ever rises.

    weights: [s, g, n] and H [n, n], fp64. Ends early when no assignment changes.
    """
    for _ in range(sweeps):
        swept = sweep(weights, hessian, found)
        if torch.equal(swept.indices, found.indices):
            break
        found = updated(weights, hessian, swept, steps)
    return found


def sweep(weights: torch.Tensor, hessian: torch.Tensor, found: Strips) -> Strips:
    """Reassign every vector once, from the first to the last, all rows at once."""
    dim = found.codebooks.shape[3]
    span = dim * found.width
    indices, quantized = found.indices.clone(), found.dense()
    for start in range(0, weights.shape[2], span):
        stop = min(start + span, weights.shape[2])
        codebooks = found.codebooks[:, start // span]
        gradient = (quantized - weights) @ hessian[:, start:stop]
        moved = torch.zeros_like(gradient)
        for first in range(start, stop, dim):
            here, local = slice(first, first + dim), slice(first - start, first - start + dim)
            own = hessian[here, here]
            slope = gradient[..., local] + moved[..., : local.start] @ hessian[start:first, here]
            images = codebooks @ own
            cost = torch.baddbmm(
                (images * codebooks).sum(2)[:, None],
                slope - quantized[..., here] @ own,
                codebooks.mT,
                alpha=2,
            )
            chosen = cost.argmin(2)
            centroids = codebooks.gather(1, chosen[..., None].expand(-1, -1, dim))
            moved[..., local] = centroids - quantized[..., here]
            quantized[..., here] = centroids
            indices[..., first // dim] = chosen
    return replace(found, indices=indices)
