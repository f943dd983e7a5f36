"""Perplexity of every method at every kept fraction, and of K/V projections alone.

Calibration is collected once: weight statistics on the dense model, K/V statistics per mode. Every
point is a copy of the dense model with factors or bases in the checkpoint's dtype installed, run in
fp32 on a CPU, and scored with the protocol of offline_compress.evaluation.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from benchmarks.machine import Machine
from offline_compress import kv, pipeline, reference
from offline_compress.calibration import LayerStatistics, collect, sites, split
from offline_compress.evaluation import default_bos, perplexity, tokenize_file
from offline_compress.planning import plan
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe
from offline_compress.weights import Source, open_source


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
        tokenizer = pipeline.load_tokenizer(source.directory)
        bos = default_bos(tokenizer)
        corpus = split(
            tokenize_file(tokenizer, calibration),
            samples=samples,
            held_out=0,
            context=context,
            seed=0,
            bos=bos,
        )
        device = pipeline.pick_device("auto")
        dtype = pipeline.compute_dtype(device, source.torch_dtype)
        model = reference.load(source.directory, device, dtype)
        tokens = tokenize_file(tokenizer, text)
        return cls(source, model, corpus.calibration, tokens, context, batch, bos, progress)

    def score(self, model: PreTrainedModel) -> float:
        """Perplexity on the text."""
        found = perplexity(model, self.tokens, self.context, self.batch, self.bos, self.progress)
        return found.perplexity

    def statistics(self) -> dict[str, LayerStatistics]:
        """Grams of the dense model, by the linear layer at which each is observed."""
        paths = sites(self.source.family, self.source.config).values()
        return collect(self.model, paths, self.windows, self.batch, self.progress)

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
    """One point after another: methods at each kept fraction, then modes at each kv_kept."""

    def point(what: str, share: float, recipe: CompressionRecipe, model: PreTrainedModel) -> Point:
        totals = plan(recipe, laboratory.source).totals
        scored = laboratory.score(model)
        return Point(
            what=what,
            kept=share,
            perplexity=scored,
            change_percent=100 * (scored / dense - 1),
            checkpoint_bytes=totals.checkpoint_bytes,
            kv_bytes_per_token=totals.kv_bytes_per_token,
        )

    grams = laboratory.statistics() if methods and kept else {}
    for share in kept:
        for method in methods:
            recipe = CompressionRecipe.model_validate(
                {"weights": {"method": method, "kept": share}, "kv": {"kept": None}}
            )
            yield point(method, share, recipe, laboratory.with_weights(recipe, grams))
    del grams
    for mode in modes:
        recipes = [
            CompressionRecipe.model_validate(
                {"weights": {"kept": 1.0}, "kv": {"mode": mode, "kept": share}}
            )
            for share in kv_kept
        ]
        if not recipes:
            continue
        projected = plan(recipes[0], laboratory.source).projected
        moments = kv.collect(
            laboratory.model,
            laboratory.source.family,
            laboratory.windows,
            {path: projection.mode for path, projection in projected.items()},
            laboratory.batch,
            laboratory.progress,
        )
        for share, recipe in zip(kv_kept, recipes, strict=True):
            yield point(f"kv {mode}", share, recipe, laboratory.with_projections(recipe, moments))
