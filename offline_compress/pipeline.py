"""From a dense model and a recipe to a compressed checkpoint: calibrate, factorise, write."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from offline_compress import kv, reference
from offline_compress.allocation import RankPlan
from offline_compress.calibration import Corpus, collect, output_errors, sites
from offline_compress.checkpoint import (
    CacheError,
    MatrixError,
    Measurements,
    bytes_needed,
    write,
)
from offline_compress.evaluation import Perplexity, perplexity
from offline_compress.kv import KVBases
from offline_compress.methods import Factorization, LowRankFactors
from offline_compress.planning import site_groups
from offline_compress.preflight import (
    PreparedRun,
    compute_dtype,
    load_tokenizer,
    pick_device,
    prepare_run,
)
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe
from offline_compress.staging import staged
from offline_compress.weights import Source
from vllm_svd.errors import SvdError

__all__ = ["NumericalError", "compress", "compute_dtype", "load_tokenizer", "pick_device"]


class NumericalError(SvdError):
    """A result that is not finite."""


def compress(
    recipe: CompressionRecipe, model: str, out: Path, progress: Progress = silent
) -> Measurements:
    """Write the compressed checkpoint `out` and return what it was measured to lose.

    The same recipe gives the same bytes on the same machine. Raises SvdError for anything a user
    can cause; nothing is left behind then.
    """
    ready = prepare_run(recipe, model, out)
    needed = bytes_needed(ready.source, ready.ranks)
    with staged(out, needed) as directory:
        return _compress(recipe, ready, directory, progress)


def _compress(
    recipe: CompressionRecipe, ready: PreparedRun, directory: Path, progress: Progress
) -> Measurements:
    source, ranks, corpus = ready.source, ready.ranks, ready.corpus
    dtype = compute_dtype(ready.device, source.torch_dtype)
    network = reference.load(source.directory, ready.device, dtype)

    found = _factorize(network, recipe, source, ranks, corpus, progress)
    factors = {path: done.factors for path, done in found.items()}
    before = _score(network, recipe, corpus, progress)
    held_out = _held_out_errors(network, recipe, factors, corpus, progress)
    for path, pair in factors.items():
        reference.install_factors(network, path, pair)
    bases, caches = _project(network, recipe, source, ranks, corpus, progress)
    for path, basis in bases.items():
        reference.install_kv(network, source.family, path, basis)

    after = _score(network, recipe, corpus, progress)
    measured = Measurements(
        base_model=source.public_name,
        text=Path(str(recipe.calibration.text)).name,
        text_sha256=ready.text_sha256,
        calibration_tokens=corpus.calibration.numel(),
        held_out_tokens=len(corpus.held_out),
        scored_tokens=after.tokens,
        context=recipe.calibration.context,
        perplexity_dense=before.perplexity,
        perplexity=after.perplexity,
        matrices={
            path: MatrixError(predicted=done.loss, held_out=held_out[path], damping=done.damping)
            for path, done in found.items()
        },
        caches=caches,
        versions={name: version(name) for name in ("vllm-svd", "torch", "transformers")},
    )
    write(
        directory,
        source=source,
        recipe=recipe,
        plan=ranks,
        factors=factors,
        bases=bases,
        measured=measured,
        progress=progress,
    )
    return measured


def _score(
    network: PreTrainedModel, recipe: CompressionRecipe, corpus: Corpus, progress: Progress
) -> Perplexity:
    context, batch = recipe.calibration.context, recipe.calibration.batch
    return perplexity(network, corpus.held_out, context, batch, corpus.bos, progress)


def _factorize(
    network: PreTrainedModel,
    recipe: CompressionRecipe,
    source: Source,
    ranks: RankPlan,
    corpus: Corpus,
    progress: Progress,
) -> dict[str, Factorization]:
    """Every matrix of the plan; one pass of the dense model over the text per group of Grams."""
    planned, method = ranks.compressed, recipe.weights.method
    readers: dict[str, list[str]] = {}
    for path, site in sites(source.family, source.config).items():
        if path in planned:
            readers.setdefault(site, []).append(path)
    found: dict[str, Factorization] = {}
    for group in site_groups(recipe, source, ranks.matrices):
        windows, batch = corpus.calibration, recipe.calibration.batch
        statistics = collect(network, group, windows, batch, method.needs, progress)
        for site in group:
            seen = statistics.pop(site)  # Grams are most of the memory: none outlives its readers
            for path in readers[site]:
                weight = network.get_submodule(path).weight.detach()
                result = method.factorize(weight, seen, planned[path])
                found[path] = replace(result, factors=_stored(path, result.factors, source))
                progress("factorise", len(found), len(planned))
            del seen
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
