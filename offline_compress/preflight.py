"""Everything that can be wrong with a command's input, found and reported in one go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from offline_compress import reference
from offline_compress.allocation import RankPlan
from offline_compress.calibration import Corpus, split
from offline_compress.checkpoint import bytes_needed, ensure_room, ensure_vacant
from offline_compress.evaluation import check_context, default_bos, read_text, tokenize
from offline_compress.planning import plan
from offline_compress.recipe import CompressionRecipe, RecipeError
from offline_compress.weights import Source, SourceError, open_source
from offline_compress.workspace import forsaken
from vllm_svd.errors import SvdError
from vllm_svd.format import sha256

T = TypeVar("T")


class PreflightError(SvdError):
    """Several independent errors, each with its remedy."""

    def __init__(self, errors: Sequence[SvdError]) -> None:
        self.errors = tuple(errors)
        listed = "".join(f"\n\n{number}. {error}" for number, error in enumerate(errors, start=1))
        super().__init__(f"{len(self.errors)} problems were found{listed}")


@dataclass(frozen=True)
class PreparedRun:
    """What `run` works on; `text_sha256` is of the file that `corpus` was cut from.

    `base` is the model that `source` was fine-tuned from, where the method needs it.
    """

    source: Source
    ranks: RankPlan
    device: torch.device
    corpus: Corpus
    text_sha256: str
    base: Source | None = None


@dataclass(frozen=True)
class PreparedEvaluation:
    """What `evaluate` works on: the model computes in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    tokens: torch.Tensor
    bos: int | None


def prepare_run(
    recipe: CompressionRecipe, model: str, out: Path, invalid: RecipeError | None = None
) -> PreparedRun:
    """Check all that `run` needs before it loads the model; weights of a hub model come last.

    `invalid` is what was found wrong with the recipe already. Raises the only SvdError found, or
    PreflightError with all of them.
    """
    found = _Found(invalid)
    if recipe.calibration.text is None and not _hides_text(invalid):
        missing = "calibration.text (--text): missing; give a UTF-8 text file"
        found.errors.append(RecipeError("the recipe", [missing]))
    source, ranks, device, corpus = _prepare(recipe, model, out, found)
    found.attempt(lambda: _base(recipe, source, weights=False))
    if source is None or ranks is None or device is None or corpus is None or found.errors:
        raise found.error()
    if source.stored is None:
        source = open_source(model, quantised=_leaves_weights(recipe))
        ranks = plan(recipe, source)
    base = _base(recipe, source)
    digest = sha256(Path(str(recipe.calibration.text)))
    return PreparedRun(source, ranks, device, corpus, digest, base)


def prepare_plan(
    recipe: CompressionRecipe, model: str, out: Path | None, invalid: RecipeError | None = None
) -> RankPlan:
    """The checks of `prepare_run` on what is given: `out` and the text may be missing."""
    found = _Found(invalid)
    _, ranks, _, _ = _prepare(recipe, model, out, found)
    if ranks is None or found.errors:
        raise found.error()
    return ranks


def prepare_evaluation(
    directory: Path, text: Path, context: int, device: str
) -> PreparedEvaluation:
    """Check all that `evaluate` needs before it reads a weight; raises like `prepare_run`."""
    found = _Found()
    where = found.attempt(lambda: pick_device(device))
    content = found.attempt(lambda: read_text(text))
    described = found.attempt(lambda: reference.describe(directory))
    scored = None
    if described is not None:
        config, _ = described
        found.attempt(lambda: check_context(context, config))
        tokenizer = found.attempt(lambda: load_tokenizer(directory))
        if tokenizer is not None and content is not None:
            scored = found.attempt(lambda: _tokens(tokenizer, content, config))
    if where is None or described is None or scored is None or found.errors:
        raise found.error()
    return PreparedEvaluation(where, compute_dtype(where, described[1]), *scored)


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one; raises SvdError if `cuda` is asked for and absent."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise SvdError(
            "calibration.device (--device): cuda was given and torch finds no CUDA device\n"
            "Remedy: use cpu or auto, or install a CUDA build of torch on a machine with a GPU"
        )
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """fp32 on a CPU, where half precision is slower and no closer to what a GPU computes."""
    return torch.float32 if device.type == "cpu" else stored


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; raises SourceError if it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of the tokenizers library too, which raises bare Exception
        raise SourceError(
            f"{directory} holds no tokenizer that transformers can load: {error}\n"
            "Remedy: copy tokenizer.json and tokenizer_config.json of the model into it"
        ) from None
    return tokenizer


class _Found:
    """The errors of independent checks."""

    def __init__(self, *errors: SvdError | None) -> None:
        self.errors = [error for error in errors if error is not None]

    def attempt(self, check: Callable[[], T]) -> T | None:
        """What the check gives, or None where it raises."""
        try:
            return check()
        except SvdError as error:
            self.errors.append(error)
            return None

    def error(self) -> SvdError:
        return self.errors[0] if len(self.errors) == 1 else PreflightError(self.errors)


def _prepare(
    recipe: CompressionRecipe, model: str, out: Path | None, found: _Found
) -> tuple[Source | None, RankPlan | None, torch.device | None, Corpus | None]:
    text = recipe.calibration.text
    content = found.attempt(lambda: read_text(Path(text))) if text is not None else None
    device = found.attempt(lambda: pick_device(recipe.calibration.device))
    source = found.attempt(
        lambda: open_source(model, weights=False, quantised=_leaves_weights(recipe))
    )
    ranks = corpus = None
    if source is not None:
        ranks = found.attempt(lambda: plan(recipe, source))
        tokenizer = found.attempt(lambda: load_tokenizer(source.directory))
        if tokenizer is not None and content is not None:
            corpus = found.attempt(lambda: _corpus(recipe, tokenizer, content, source.config))

    def output_fits(out: Path) -> None:
        ensure_vacant(out)
        if source is not None and ranks is not None:
            # The work directory is beside the output, and may hold what was computed before.
            there = sum(forsaken(out).values())
            needed = bytes_needed(source, ranks)
            ensure_room(out, needed + max(0, _work_bytes(recipe, ranks, source, device) - there))

    if out is not None:
        found.attempt(lambda: output_fits(out))
    return source, ranks, device, corpus


def _leaves_weights(recipe: CompressionRecipe) -> bool:
    """Whether the matrices stay as they are, and may then be quantised by another method."""
    return recipe.weights.kept == 1


def _work_bytes(
    recipe: CompressionRecipe, ranks: RankPlan, source: Source, device: torch.device | None
) -> int:
    """What the work directory holds at its largest; the cost is of hidden states in fp32."""
    cost, itemsize = ranks.calibration, 4
    if device is not None:
        itemsize = compute_dtype(device, source.torch_dtype).itemsize
    hidden = cost.hidden_bytes * itemsize // 4
    return cost.work_bytes + (hidden if hidden > recipe.calibration.host_memory_gib * 2**30 else 0)


def _base(recipe: CompressionRecipe, source: Source | None, weights: bool = True) -> Source | None:
    """The base model, which must have the same matrices as the source, where that was found."""
    name = recipe.weights.method.base_model
    if name is None:
        return None
    try:
        base = open_source(name, weights=weights)
    except SourceError as error:
        where = str(error).removeprefix("MODEL ")
        raise SourceError(f"weights.method.base {where}") from None
    if source is not None and base.linears() != source.linears():
        raise SourceError(
            f"weights.method.base: {name} has other matrices than {source.name}\n"
            "Remedy: give the model that this one was fine-tuned from"
        )
    return base


def _hides_text(invalid: RecipeError | None) -> bool:
    """Whether calibration.text may have been given in what could not be read."""
    hiding = ("it ", "calibration:", "calibration.text")
    return invalid is not None and any(line.startswith(hiding) for line in invalid.problems)


def _corpus(
    recipe: CompressionRecipe,
    tokenizer: PreTrainedTokenizerBase,
    content: str,
    config: PretrainedConfig,
) -> Corpus:
    tokens, bos = _tokens(tokenizer, content, config)
    return split(
        tokens,
        samples=recipe.calibration.samples,
        held_out=recipe.evaluation.samples,
        context=recipe.calibration.context,
        seed=recipe.calibration.seed,
        bos=bos,
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: str, config: PretrainedConfig
) -> tuple[torch.Tensor, int | None]:
    """Token ids and BOS, each of which the model embeds."""
    tokens, bos = tokenize(tokenizer, content), default_bos(tokenizer)
    largest = max(int(tokens.max()), -1 if bos is None else bos)
    if largest >= config.vocab_size:
        raise SvdError(
            f"the tokenizer, of {len(tokenizer)} tokens, gives token id {largest}; the model "
            f"embeds {config.vocab_size} (vocab_size)\n"
            "Remedy: copy the tokenizer files that belong to this model"
        )
    return tokens, bos
