"""From a dense model and a recipe to a compressed checkpoint: calibrate, factorise, write."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from offline_compress import kv, reference
from offline_compress.allocation import RankPlan
from offline_compress.calibration import Corpus, collect, output_errors, sites, split
from offline_compress.checkpoint import (
    CacheError,
    MatrixError,
    Measurements,
    bytes_needed,
    ensure_room,
    ensure_vacant,
    write,
)
from offline_compress.evaluation import default_bos, perplexity, tokenize_file
from offline_compress.kv import KVBases
from offline_compress.methods import Factorization, LowRankFactors
from offline_compress.planning import plan
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe, RecipeError
from offline_compress.weights import Source, SourceError, open_source
from vllm_svd.errors import SvdError


class NumericalError(SvdError):
    """A result that is not finite."""


def compress(
    recipe: CompressionRecipe, model: str, out: Path, progress: Progress = silent
) -> Measurements:
    """Write the compressed checkpoint `out` and return what it was measured to lose.

    The same recipe gives the same bytes on the same machine. Raises SvdError for anything a user
    can cause; nothing is left behind then.
    """
    if recipe.calibration.text is None:
        raise RecipeError(
            "the recipe", ["calibration.text (--text): missing; give a UTF-8 text file"]
        )
    ensure_vacant(out)
    source = open_source(model)
    ranks = plan(recipe, source)
    ensure_room(out, bytes_needed(source, ranks))
    device = pick_device(recipe.calibration.device)
    corpus = _corpus(recipe, load_tokenizer(source.directory))
    network = reference.load(source.directory, device, compute_dtype(device, source.torch_dtype))

    found = _factorize(network, recipe, source, ranks, corpus, progress)
    factors = {path: done.factors for path, done in found.items()}
    before = _score(network, recipe, corpus, progress)
    held_out = _held_out_errors(network, recipe, factors, corpus, progress)
    for path, pair in factors.items():
        reference.install_factors(network, path, pair)
    bases, caches = _project(network, recipe, source, ranks, corpus, progress)
    for path, basis in bases.items():
        reference.install_kv(network, source.family, path, basis)

    measured = Measurements(
        base_model=source.public_name,
        text=Path(recipe.calibration.text).name,
        calibration_tokens=corpus.calibration.numel(),
        held_out_tokens=len(corpus.held_out),
        context=recipe.calibration.context,
        perplexity_dense=before,
        perplexity=_score(network, recipe, corpus, progress),
        matrices={
            path: MatrixError(predicted=done.loss, held_out=held_out[path], damping=done.damping)
            for path, done in found.items()
        },
        caches=caches,
        versions={name: version(name) for name in ("vllm-svd", "torch", "transformers")},
    )
    write(
        out,
        source=source,
        recipe=recipe,
        plan=ranks,
        factors=factors,
        bases=bases,
        measured=measured,
        progress=progress,
    )
    return measured


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{directory} holds no tokenizer that transformers can load: {error}\n"
            "Remedy: copy tokenizer.json and tokenizer_config.json of the model into it"
        ) from None
    return tokenizer


def _corpus(recipe: CompressionRecipe, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    calibration = recipe.calibration
    return split(
        tokenize_file(tokenizer, Path(str(calibration.text))),
        samples=calibration.samples,
        held_out=recipe.evaluation.samples,
        context=calibration.context,
        seed=calibration.seed,
        bos=default_bos(tokenizer),
    )


def _score(
    network: PreTrainedModel, recipe: CompressionRecipe, corpus: Corpus, progress: Progress
) -> float:
    context, batch = recipe.calibration.context, recipe.calibration.batch
    return perplexity(network, corpus.held_out, context, batch, corpus.bos, progress).perplexity


def _factorize(
    network: PreTrainedModel,
    recipe: CompressionRecipe,
    source: Source,
    ranks: RankPlan,
    corpus: Corpus,
    progress: Progress,
) -> dict[str, Factorization]:
    """Every matrix of the plan, from one pass of the dense model over the calibration windows."""
    planned = ranks.compressed
    if not planned:
        return {}
    observed = sites(source.family, source.config)
    statistics = collect(
        network,
        [observed[path] for path in planned],
        corpus.calibration,
        recipe.calibration.batch,
        progress,
    )
    found = {}
    last_reader = {observed[path]: path for path in planned}
    progress("factorise", 0, len(planned))
    for done, (path, rank) in enumerate(planned.items(), start=1):
        weight = network.get_submodule(path).weight.detach()
        site = observed[path]
        result = recipe.weights.method.factorize(weight, statistics[site], rank)
        found[path] = replace(result, factors=_stored(path, result.factors, source))
        if last_reader[site] == path:
            del statistics[site]  # the Grams are most of the memory
        progress("factorise", done, len(planned))
    return found


def _held_out_errors(
    network: PreTrainedModel,
    recipe: CompressionRecipe,
    factors: Mapping[str, LowRankFactors],
    corpus: Corpus,
    progress: Progress,
) -> dict[str, float]:
    if not factors:
        return {}
    pairs = {path: (pair.A, pair.B) for path, pair in factors.items()}
    windows, batch = corpus.held_out_windows(), recipe.calibration.batch
    return output_errors(network, pairs, windows, batch, progress)


def _stored(path: str, exact: LowRankFactors, source: Source) -> LowRankFactors:
    """The factors in the dtype of the checkpoint."""
    factors = exact.to(source.torch_dtype)
    for name, factor in (("A", factors.A), ("B", factors.B)):
        if not torch.isfinite(factor).all():
            raise NumericalError(
                f"{path}.{name} is not finite in {source.dtype}\n"
                "Remedy: check the checkpoint for damaged weights, or store it in BF16 or F32"
            )
    return factors


def _project(
    network: PreTrainedModel,
    recipe: CompressionRecipe,
    source: Source,
    ranks: RankPlan,
    corpus: Corpus,
    progress: Progress,
) -> tuple[dict[str, KVBases], Mapping[str, CacheError]]:
    """K/V bases of the model as its weights now are, and their error on held-out windows."""
    planned = ranks.projected
    if not planned:
        return {}, {}
    modes = {path: projection.mode for path, projection in planned.items()}
    batch = recipe.calibration.batch

    def observe(windows: torch.Tensor) -> dict[str, kv.KVStatistics]:
        return kv.collect(network, source.family, windows, modes, batch, progress)

    seen, unseen = observe(corpus.calibration), observe(corpus.held_out_windows())
    bases, errors = {}, {}
    for path, projection in planned.items():
        bases[path] = kv.project(seen[path], projection).to(source.torch_dtype)
        k_error, v_error = kv.kv_error(unseen[path], bases[path])
        errors[path] = CacheError(k_error=k_error, v_error=v_error)
    return bases, errors
