"""Perplexity of a causal language model on a text."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from offline_compress.calibration import Network, Streams
from offline_compress.progress import Progress
from vllm_svd.errors import SvdError

# Tokens whose logits are compared at a time: vocabularies are large.
_SCORED = 256


@dataclass(frozen=True)
class Perplexity:
    """exp(nll), with nll in nats per scored token, and the protocol it was measured with.

    `tokens` were scored, in non-overlapping `windows` of `context` tokens, BOS included where
    `bos`; each window is `stride` tokens of the text behind the one before. `dtype` is what the
    model computed in.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    context: int
    stride: int
    bos: bool
    dtype: str

    def __str__(self) -> str:
        start = "BOS and " if self.bos else ""
        unscored = "" if self.bos else ", the first unscored"
        return (
            f"perplexity {self.perplexity:.3f} over {self.tokens} scored tokens, context "
            f"{self.context}\nprotocol: {self.windows} non-overlapping windows of {start}"
            f"{self.stride} tokens{unscored}, in {self.dtype}"
        )


@dataclass(frozen=True)
class Fidelity:
    """A compressed model beside its dense one, over `tokens` scored tokens of held-out windows.

    `kl` is KL(dense || compressed) in nats per token, `top1` the fraction of tokens whose most
    likely successor is the same.
    """

    perplexity_dense: float
    perplexity: float
    kl: float
    top1: float
    tokens: int


@torch.no_grad()
def fidelity(network: Network, streams: Streams, windows: torch.Tensor) -> Fidelity:
    """Score the held-out ends of both streams, behind the last block; `windows` [n, context].

    Every token of a window but its first is scored, as `perplexity` does. Raises SvdError for a
    perplexity that is not finite.
    """
    mine = windows[streams.workers.share(len(windows))].to(network.device)
    sums = torch.zeros(5, dtype=torch.float64, device=network.device)
    for rows in streams.held_out():
        ids = mine[rows.start - streams.calibration : rows.stop - streams.calibration, 1:]
        hidden = [
            stream.read(rows, network.device)[:, :-1].flatten(0, 1)
            for stream in (streams.dense, streams.compressed)
        ]
        for dense, other, next_ids in zip(
            *(torch.split(flat, _SCORED) for flat in (*hidden, ids.flatten())), strict=True
        ):
            sums += _agreement(network.logits(dense), network.logits(other), next_ids[:, None])
    nll_dense, nll, kl, same, tokens = streams.workers.sum(sums).tolist()
    for mean in (nll_dense / tokens, nll / tokens):
        _check_finite(mean)
    return Fidelity(
        perplexity_dense=math.exp(nll_dense / tokens),
        perplexity=math.exp(nll / tokens),
        kl=kl / tokens,
        top1=same / tokens,
        tokens=int(tokens),
    )


@torch.no_grad()
def divergence(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """Mean KL(first || second), nats per token, of what `head` says of pairs [tokens, hidden]."""
    total, tokens = 0.0, 0
    for first, second in hidden:
        for before, behind in zip(
            torch.split(first, _SCORED), torch.split(second, _SCORED), strict=True
        ):
            exact, other = (head(part).double().log_softmax(-1) for part in (before, behind))
            total += float((exact.exp() * (exact - other)).sum())
            tokens += len(before)
    return total / tokens


def _agreement(dense: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sums over logits [tokens, vocabulary]: both losses, KL, same most likely token, tokens."""
    dense, other = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    same = dense.argmax(-1) == other.argmax(-1)
    return torch.stack(
        [
            -dense.gather(-1, ids).sum(),
            -other.gather(-1, ids).sum(),
            (dense.exp() * (dense - other)).sum(),
            same.double().sum(),
            torch.ones_like(same, dtype=torch.float64).sum(),
        ]
    )


def read_text(path: Path) -> str:
    """A UTF-8 text file; raises SvdError if it cannot be read or is blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SvdError(
            f"{path} cannot be read as UTF-8 text: {error}\nRemedy: give a plain text file"
        ) from None
    if not text.strip():
        raise SvdError(f"{path} holds no text\nRemedy: give a text file that is not empty")
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids [total] of a text as one string, without special tokens.

    Raises SvdError if the tokenizer finds no token in it.
    """
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise SvdError("the tokenizer finds no token in the text\nRemedy: give another text")
    return torch.tensor(tokens, dtype=torch.long)


def tokenize_file(tokenizer: PreTrainedTokenizerBase, path: Path) -> torch.Tensor:
    """Token ids [total] of a UTF-8 text file; raises SvdError like read_text and tokenize."""
    return tokenize(tokenizer, read_text(path))


def default_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token if the tokenizer puts one before a text by default, else None."""
    first = tokenizer("")["input_ids"][:1]
    return int(first[0]) if first and first[0] == tokenizer.bos_token_id else None


def check_context(context: int, config: PretrainedConfig) -> None:
    """Raises SvdError if the model has fewer positions than a window has tokens."""
    positions = config.max_position_embeddings
    if context > positions:
        raise SvdError(
            f"a context of {context} tokens exceeds the model's {positions} positions\n"
            f"Remedy: give a --context of at most {positions}"
        )


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    context: int,
    batch: int,
    bos: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Token-weighted perplexity of `tokens` [total] over non-overlapping windows.

    Protocol: the model sees `context` tokens at a time. With `bos`, each window is BOS and
    `context - 1` tokens of the text, all of them scored. Without, it is `context` tokens of the
    text, the first of which has nothing before it and is not scored. The last, shorter window
    counts by its tokens. Raises SvdError if there is nothing to score, if the context exceeds the
    model's positions, or if the perplexity is not finite.
    """
    check_context(context, model.config)
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    stride = context - len(prefix)
    windows = [torch.cat((prefix, part)) for part in torch.split(tokens, max(stride, 1))]
    windows = [window for window in windows if len(window) > 1]
    if context < 2 or batch < 1 or not windows:
        raise SvdError(
            f"nothing to score in {len(tokens)} tokens with context {context} and batch {batch}\n"
            "Remedy: give at least two tokens, a context of at least 2 and a batch of at least 1"
        )
    nll, scored, done = 0.0, 0, 0
    while done < len(windows):
        rows = [w for w in windows[done : done + batch] if len(w) == len(windows[done])]
        ids = torch.stack(rows).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        nll += float(losses.double().sum())
        scored += losses.numel()
        done += len(rows)
        if progress is not None:
            progress("perplexity", done, len(windows))
    mean = nll / scored
    _check_finite(mean)
    return Perplexity(
        perplexity=math.exp(mean),
        nll=mean,
        tokens=scored,
        windows=len(windows),
        context=context,
        stride=stride,
        bos=bos is not None,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _check_finite(nats: float) -> None:
    if not nats < math.log(sys.float_info.max):
        raise SvdError(
            f"the perplexity is not finite: a token has {nats:.3g} nats on average\n"
            "Remedy: evaluate in bfloat16 or float32, and check the checkpoint"
        )
