"""Several fine-tuned models on one base: their differences joined, one tensor at a time.

Task arithmetic: Ilharco et al., ICLR 2023, arXiv 2212.04089. W = W_base + lambda sum_t dW_t.
TIES: Yadav et al., NeurIPS 2023, arXiv 2306.01708. Trim the small entries of every dW_t, elect for
each place the sign with the larger sum, and add lambda times the mean of those that agree.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from vllm_svd.errors import SvdError

Reader = Callable[[str], torch.Tensor]
Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def task_arithmetic(deltas: Sequence[torch.Tensor], scale: float = 1.0) -> torch.Tensor:
    """scale * sum of the deltas, of one shape, in fp64."""
    return scale * _stacked(deltas).sum(0)


def ties(deltas: Sequence[torch.Tensor], keep: float = 0.2, scale: float = 1.0) -> torch.Tensor:
    """Trim, elect and average the deltas, of one shape, in fp64.

    Of each delta the fraction `keep` in (0, 1] of largest magnitude stays, and what equals the
    smallest of it. Where the signs balance out the result is zero. Raises SvdError for another
    `keep`.
    """
    if not 0 < keep <= 1:
        raise SvdError(
            f"ties keeps {keep} of every delta; accepted is a fraction above 0 and at most 1\n"
            "Remedy: set keep to 0.2, which the paper uses, or 1 to trim nothing"
        )
    trimmed = torch.stack([_trimmed(delta, keep) for delta in _stacked(deltas)])
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    total = torch.where(agrees, trimmed, 0.0).sum(0)
    return scale * total / agrees.sum(0).clamp_min(1)


def difference(base: Reader, tuned: Reader) -> Reader:
    """Reads tuned - base, in fp64; raises SvdError where the shapes differ."""

    def read(name: str) -> torch.Tensor:
        ours, theirs = base(name), tuned(name)
        if ours.shape != theirs.shape:
            raise SvdError(
                f"{name} is {list(theirs.shape)} in a fine-tuned model and {list(ours.shape)} in "
                "the base\nRemedy: merge models fine-tuned from this base, with its vocabulary"
            )
        return theirs.double() - ours.double()

    return read


def merge(
    names: Iterable[str], base: Reader, deltas: Sequence[Reader], combine: Combine
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the base plus its combined deltas, in the base's dtype; one at a time."""
    for name in names:
        dense = base(name)
        joined = combine([read(name) for read in deltas])
        yield name, (dense.double() + joined).to(dense.dtype)


def _stacked(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """[tasks, ...] in fp64; raises SvdError without deltas or for several shapes."""
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) != 1:
        found = f"of shapes {sorted(map(list, shapes))}" if shapes else "none at all"
        raise SvdError(
            f"deltas to merge must be of one shape; given: {found}\n"
            "Remedy: give at least one model, and only models fine-tuned from one base"
        )
    return torch.stack([delta.double() for delta in deltas])


def _trimmed(delta: torch.Tensor, keep: float) -> torch.Tensor:
    size = delta.abs()
    dropped = delta.numel() - max(1, round(keep * delta.numel()))
    if dropped <= 0:
        return delta
    threshold = size.flatten().kthvalue(dropped + 1).values
    return torch.where(size >= threshold, delta, 0.0)
