"""A compressed model beside its dense one on a text."""

import math
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_compress.evaluation import default_bos, tokenize_file
from offline_compress.progress import Progress
from vllm_svd.errors import SvdError


class Agreement(BaseModel):
    """Over the scored tokens of a text: perplexity, KL(dense || compressed) in nats per token, and
    the fraction of tokens with the same most likely successor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    perplexity: float
    kl: float
    top1: float


class Scored:
    """A text cut into windows like `offline-compress evaluate` does, whole windows only.

    At most `most` of them, from the beginning.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        most: int | None = None,
    ) -> None:
        self.name = name
        tokens, bos = tokenize_file(tokenizer, path), default_bos(tokenizer)
        span = context - (bos is not None)
        if len(tokens) < span:
            raise SvdError(
                f"{path} holds {len(tokens)} tokens, a window {span}\n"
                "Remedy: give a longer --text, or lower --context"
            )
        count = min(len(tokens) // span, most or len(tokens))
        windows = tokens[: count * span].view(count, span)
        if bos is not None:
            windows = torch.cat([torch.full((count, 1), bos), windows], dim=1)
        self.windows = windows
        self._dense: dict[int, torch.Tensor] = {}

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.windows[:, 1:].numel()

    @torch.inference_mode()
    def compare(
        self, dense: PreTrainedModel, other: PreTrainedModel, batch: int, progress: Progress
    ) -> Agreement:
        """`other` against `dense`, whose last hidden states are kept from the first call on.

        A model against itself has a KL of zero.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        for first in range(0, len(self.windows), batch):
            ids = self.windows[first : first + batch].to(dense.device)
            if first not in self._dense:
                self._dense[first] = _last(dense, ids)
            exact = _log_probabilities(dense, self._dense[first])
            found = _log_probabilities(other, _last(other, ids))
            nll = -found.gather(-1, ids[:, 1:, None]).double().sum()
            kl = (exact.exp() * (exact - found)).double().sum()
            same = (exact.argmax(-1) == found.argmax(-1)).double().sum()
            sums += torch.stack([nll, kl, same]).cpu()
            progress(f"score {self.name}", first + len(ids), len(self.windows))
        nll, kl, same = (sums / self.tokens).tolist()
        return Agreement(perplexity=math.exp(min(nll, 700.0)), kl=kl, top1=same)


def _last(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [windows, context - 1, hidden] that predict the next token."""
    states: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states[:, :-1]


def _log_probabilities(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = model.get_output_embeddings()(hidden)
    return scores.float().log_softmax(-1)
