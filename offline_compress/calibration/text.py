"""Text to token windows: calibration windows at random offsets, held-out text behind them."""

from dataclasses import dataclass

import torch

from vllm_svd.errors import SvdError


class TextError(SvdError):
    """A text too short for the windows asked of it; raised before any model is loaded."""


@dataclass(frozen=True)
class Corpus:
    """`calibration` [samples, context] and `held_out` token ids, whole windows of the latter.

    The two share no token of the text. Each calibration window starts with the BOS token where
    the tokenizer prepends one by default, as a served prompt does; `held_out` is bare text.
    """

    calibration: torch.Tensor
    held_out: torch.Tensor
    bos: int | None

    def held_out_windows(self) -> torch.Tensor:
        """`held_out` in the shape of `calibration`: windows [n, context], with BOS."""
        span = self.calibration.shape[1] - (self.bos is not None)
        return _with_bos(self.held_out.view(-1, span), self.bos)


def split(
    tokens: torch.Tensor,
    *,
    samples: int,
    held_out: int,
    context: int,
    seed: int,
    bos: int | None,
) -> Corpus:
    """Windows of `context` tokens: `samples` of them for calibration, `held_out` at the end.

    Calibration windows do not overlap: sorted random gaps are drawn between them, so any text of
    at least (samples + held_out) * context tokens suffices. Raises TextError with that number.
    """
    needed = (samples + held_out) * context  # a token more per window than BOS leaves to be used
    if len(tokens) < needed:
        raise TextError(
            f"the text holds {len(tokens)} tokens; {samples} calibration and {held_out} held-out "
            f"windows of {context} tokens need {needed}\n"
            "Remedy: give a longer --text, or lower --samples, calibration.context or "
            "evaluation.samples"
        )
    span = context - (bos is not None)
    cut = len(tokens) - held_out * span
    body, tail = tokens[:cut], tokens[cut:]
    generator = torch.Generator().manual_seed(seed)
    slack = len(body) - samples * span
    gaps, _ = torch.randint(slack + 1, (samples,), generator=generator).sort()
    starts = gaps + span * torch.arange(samples)
    windows = body[starts[:, None] + torch.arange(span)]
    return Corpus(_with_bos(windows, bos), tail, bos)


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
