"""Perplexity of every method at every kept fraction, and of K/V projections alone.

Calibration is collected once: weight statistics on the dense model, K/V statistics per mode. Every
point is a copy of the dense model with factors or bases in the checkpoint's dtype installed, run in
fp32 on a CPU, and scored with the protocol of offline_compress.evaluation.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, get_args

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from benchmarks.machine import Machine
from offline_compress import kv, preflight, reference
from offline_compress.allocation import RankPlan
from offline_compress.calibration import LayerStatistics, Needs, collect, sites, split
from offline_compress.evaluation import default_bos, perplexity, tokenize_file
from offline_compress.planning import plan
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe, RecipeError, load
from offline_compress.weights import Source, open_source


class Axes(TypedDict):
    """What to measure: every method at each `kept`, every mode at each `kv_kept`."""

    methods: Sequence[str]
    kept: Sequence[float]
    modes: Sequence[str]
    kv_kept: Sequence[float]


@dataclass(frozen=True)
class Variant:
    """One point to measure: weights are compressed, or the K/V cache in `mode`, never both."""

    what: str
    kept: float
    recipe: CompressionRecipe
    mode: str | None = None


def variants(
    *,
    methods: Sequence[str],
    kept: Sequence[float],
    modes: Sequence[str],
    kv_kept: Sequence[float],
) -> list[Variant]:
    """Methods at each kept fraction, then modes at each kv_kept.

    Raises RecipeError with every value that is not accepted, by its flag.
    """
    made: list[Variant] = []
    problems: list[str] = []

    def add(what: str, share: float, flags: dict[str, object], mode: str | None = None) -> None:
        try:
            made.append(Variant(what, share, load(None, flags), mode))
        except RecipeError as error:
            problems.extend(error.problems)

    for share in kept:
        for method in methods:
            add(method, share, {"--method": method, "--kept": share, "--kv-kept": 1.0})
    for mode in modes:
        for share in kv_kept:
            flags = {"--kept": 1.0, "--kv-mode": mode, "--kv-kept": share}
            add(f"kv {mode}", share, flags, mode)
    if problems:
        raise RecipeError("the command line", list(dict.fromkeys(problems)))
    return made


class Point(BaseModel):
    """One compressed model; `kept` is of linear parameters or of KV channels, as planned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    kept: float
    perplexity: float
    change_percent: float
    checkpoint_bytes: int
    kv_bytes_per_token: int


class Quality(BaseModel):
    """All points of one model, beside the dense one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    calibration: str
    calibration_tokens: int
    text: str
    scored_tokens: int
    context: int
    dense_perplexity: float
    points: tuple[Point, ...]
    machine: Machine


@dataclass(frozen=True)
class Laboratory:
    """A dense model with what calibration said of it, and a text to score on."""

    source: Source
    model: PreTrainedModel
    windows: torch.Tensor
    tokens: torch.Tensor
    context: int
    batch: int
    bos: int | None
    progress: Progress = silent

    @classmethod
    def of(
        cls,
        directory: Path,
        calibration: Path,
        text: Path,
        *,
        samples: int,
        context: int,
        batch: int = 8,
        progress: Progress = silent,
    ) -> "Laboratory":
        """Load the model; raises SvdError for what offline-compress would refuse too."""
        source = open_source(str(directory))
        tokenizer = preflight.load_tokenizer(source.directory)
        bos = default_bos(tokenizer)
        corpus = split(
            tokenize_file(tokenizer, calibration),
            samples=samples,
            held_out=0,
            context=context,
            seed=0,
            bos=bos,
        )
        device = preflight.pick_device("auto")
        dtype = preflight.compute_dtype(device, source.torch_dtype)
        model = reference.load(source.directory, device, dtype)
        tokens = tokenize_file(tokenizer, text)
        return cls(source, model, corpus.calibration, tokens, context, batch, bos, progress)

    def score(self, model: PreTrainedModel) -> float:
        """Perplexity on the text."""
        found = perplexity(model, self.tokens, self.context, self.batch, self.bos, self.progress)
        return found.perplexity

    def statistics(self, needs: Needs) -> dict[str, LayerStatistics]:
        """Of the dense model, by the linear layer at which each input is observed."""
        paths = sites(self.source.family, self.source.config).values()
        return collect(self.model, paths, self.windows, self.batch, needs, self.progress)

    def kv_statistics(self, ranks: RankPlan) -> dict[str, kv.KVStatistics]:
        """Of the dense model, for the caches that the plan projects."""
        modes = {path: projection.mode for path, projection in ranks.projected.items()}
        family = self.source.family
        return kv.collect(self.model, family, self.windows, modes, self.batch, self.progress)

    def calibrated(self, recipe: CompressionRecipe) -> CompressionRecipe:
        """The recipe with the windows of this laboratory."""
        update = {"samples": len(self.windows), "context": self.context}
        calibration = recipe.calibration.model_copy(update=update)
        return recipe.model_copy(update={"calibration": calibration})

    def with_weights(
        self, recipe: CompressionRecipe, statistics: dict[str, LayerStatistics]
    ) -> PreTrainedModel:
        """A copy with the recipe's factors."""
        model = copy.deepcopy(self.model)
        observed = sites(self.source.family, self.source.config)
        for path, rank in plan(recipe, self.source).compressed.items():
            weight = self.model.get_submodule(path).weight.detach()
            method = recipe.weights.method
            found = method.factorize(weight, statistics[observed[path]], rank)
            stored = found.factors.to(self.source.torch_dtype)
            reference.install_factors(model, path, stored)
        return model

    def with_projections(
        self, recipe: CompressionRecipe, statistics: dict[str, kv.KVStatistics]
    ) -> PreTrainedModel:
        """A copy with the recipe's K/V projections."""
        model = copy.deepcopy(self.model)
        for path, projection in plan(recipe, self.source).projected.items():
            bases = kv.project(statistics[path], projection).to(self.source.torch_dtype)
            reference.install_kv(model, self.source.family, path, bases)
        return model


def measure(
    laboratory: Laboratory,
    *,
    methods: Sequence[str],
    kept: Sequence[float],
    modes: Sequence[str],
    kv_kept: Sequence[float],
    dense: float,
) -> Iterator[Point]:
    """One point after another, in the order of `variants`; the Grams of all layers are held."""
    wanted = [
        replace(variant, recipe=laboratory.calibrated(variant.recipe))
        for variant in variants(methods=methods, kept=kept, modes=modes, kv_kept=kv_kept)
    ]
    plans = [plan(variant.recipe, laboratory.source) for variant in wanted]
    weights: dict[str, LayerStatistics] | None = None
    caches: dict[str, kv.KVStatistics] = {}
    mode = None
    for variant, ranks in zip(wanted, plans, strict=True):
        if variant.mode is None:
            weights = weights or laboratory.statistics(_strongest(wanted))
            model = laboratory.with_weights(variant.recipe, weights)
        else:
            weights = None
            if variant.mode != mode:
                caches, mode = laboratory.kv_statistics(ranks), variant.mode
            model = laboratory.with_projections(variant.recipe, caches)
        scored = laboratory.score(model)
        yield Point(
            what=variant.what,
            kept=variant.kept,
            perplexity=scored,
            change_percent=100 * (scored / dense - 1),
            checkpoint_bytes=ranks.totals.checkpoint_bytes,
            kv_bytes_per_token=ranks.totals.kv_bytes_per_token,
        )


def _strongest(wanted: Sequence[Variant]) -> Needs:
    """What suffices for every method: each level includes those before it."""
    levels: tuple[Needs, ...] = get_args(Needs)
    needs = (variant.recipe.weights.method.needs for variant in wanted if variant.mode is None)
    return max(needs, key=levels.index)
