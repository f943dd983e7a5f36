"""A dense model and a recipe become a compressed checkpoint: measure, allocate, compress, write."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import torch

from offline_compress import cache_evidence, evidence
from offline_compress.allocation import CacheEvidence, RankPlan, Shares
from offline_compress.calibration import GRADIENTS, Network, Streams, Workers
from offline_compress.calibration.gradients import gradient_moments
from offline_compress.checkpoint import Measurements, bytes_needed, write
from offline_compress.evaluation import Fidelity, fidelity
from offline_compress.kv import KVBases
from offline_compress.methods import Recovery
from offline_compress.planning import kept_of, layers_of, matrices_of, plan
from offline_compress.preflight import (
    PreparedRun,
    compute_dtype,
    load_tokenizer,
    pick_device,
    prepare_run,
)
from offline_compress.progress import Progress, silent
from offline_compress.recipe import CompressionRecipe
from offline_compress.recovery import recover
from offline_compress.staging import staged
from offline_compress.sweep import LayerResult, NumericalError, Sweep, open_streams, stored
from offline_compress.workspace import Workspace, workspace
from vllm_svd.format import Module

__all__ = ["NumericalError", "compress", "compute_dtype", "load_tokenizer", "pick_device"]

_GIB = 1 << 30


def compress(
    recipe: CompressionRecipe, model: str, out: Path, progress: Progress = silent
) -> Measurements | None:
    """Write the compressed checkpoint `out` and return what it was measured to lose.

    The same recipe gives the same bytes on the same CPU, whether a run was killed on the way or not
    (gradients on a GPU may differ in their last bits): finished blocks wait in a work directory
    beside `out`. Under torchrun every process reads its share of the samples, and the first one
    writes; the others return None. Raises SvdError for anything a user can cause; nothing
    half-written is left behind then.
    """
    ready = prepare_run(recipe, model, out)
    workers = Workers.joined()
    with workspace(out, work_key(recipe, ready, workers), workers.first) as work:
        workers.wait()  # until the first of them holds the lock
        run = _Run(recipe, ready, work, workers, progress)
        measured, made = run.compress()
        if not workers.first:
            workers.wait()
            return None
        needed = bytes_needed(ready.source, made.ranks)
        with staged(out, needed) as directory:
            write(
                directory,
                source=ready.source,
                recipe=recipe,
                plan=made.ranks,
                modules=made.ranks.compressed,
                kv={path: bases.config for path, bases in made.bases.items()},
                read=made.read,
                measured=measured,
                base=ready.base,
                progress=progress,
            )
        workers.wait()
    return measured


def work_key(recipe: CompressionRecipe, ready: PreparedRun, workers: Workers) -> str:
    """Names everything that the results depend on: recipe, text, weights, versions, machine."""
    files = [
        sorted(
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in source.directory.iterdir()
            if path.is_file()
        )
        for source in (ready.source, ready.base)
        if source is not None
    ]
    facts = [
        recipe.model_dump(mode="json"),
        ready.text_sha256,
        files,
        [version("vllm-svd"), version("torch"), version("transformers")],
        [str(ready.device), torch.get_num_threads(), workers.size],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Made:
    """The plan as it was made, and where its tensors are: factors stay in the work directory."""

    ranks: RankPlan
    bases: Mapping[str, KVBases]
    work: Workspace
    records: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint that the source does not have."""
        if name in self.records:
            return self.work.read(self.records[name], name)
        return next(
            tensors[name]
            for path, bases in self.bases.items()
            if name in (tensors := bases.tensors(path))
        )


@dataclass(frozen=True)
class _Run:
    recipe: CompressionRecipe
    ready: PreparedRun
    work: Workspace
    workers: Workers
    progress: Progress

    def compress(self) -> tuple[Measurements, _Made]:
        recipe, ready = self.recipe, self.ready
        source, corpus = ready.source, ready.corpus
        network = Network(source, ready.device, compute_dtype(ready.device, source.torch_dtype))
        shares = None
        if recipe.weights.kept < 1:
            self._gradients(network)
            shares = self._shares(network)
        measured = self._caches(network) if recipe.kv.measures else None
        ranks = ready.ranks
        if shares is not None or measured is not None:
            ranks = plan(recipe, source, shares, measured)
        streams = self._streams(network)
        sweep = Sweep(
            network, recipe.weights.method, ranks, layers_of(source), streams, self.work, ready.base
        )
        if recipe.weights.method.recovery and ranks.compressed:
            sweep = self._recovered(sweep, recipe.weights.method.recovery)
        modules: dict[str, Module] = {}
        records: dict[str, str] = {}
        results = []
        for index, result in enumerate(sweep.run(self.progress)):
            modules |= result.modules
            for path, module in result.modules.items():
                records |= dict.fromkeys(module.tensors(path), sweep.record(index))
            results.append(replace(result, factors={}))
        scored = fidelity(network, sweep.streams, corpus.held_out_windows())
        made = _Made(_as_made(ranks, modules), _bases(ready, results), self.work, records)
        return self._measurements(scored, results), made

    def _recovered(self, sweep: Sweep, recovery: Recovery) -> Sweep:
        """The sweep again, with fine-tuned factors; caches are projected behind those alone."""
        network, source = sweep.network, self.ready.source
        weights_alone = sweep.ranks.model_copy(update={"caches": {}})
        made = list(replace(sweep, ranks=weights_alone).run(self.progress))
        sweep.streams.remove()
        tuned = recover(
            network,
            {path: factors for result in made for path, factors in result.factors.items()},
            self.ready.corpus.calibration,
            recovery,
            batch=self.recipe.calibration.batch,
            seed=self.recipe.calibration.seed,
            workers=self.workers,
            work=self.work,
            progress=self.progress,
        )
        known = [
            replace(
                result, factors={path: stored(path, tuned[path], source) for path in result.factors}
            )
            for result in made
        ]
        return replace(sweep, streams=self._streams(network), known=known)

    def _streams(self, network: Network, held_out: bool = True) -> Streams:
        corpus, calibration = self.ready.corpus, self.recipe.calibration
        unseen = corpus.held_out_windows()
        return open_streams(
            network,
            corpus.calibration,
            unseen if held_out else unseen[:0],
            batch=calibration.batch,
            limit=int(calibration.host_memory_gib * _GIB),
            work=self.work,
            workers=self.workers,
        )

    def _gradients(self, network: Network) -> None:
        """Gradient moments of every layer, in the work directory, where the method needs them."""
        needs = self.recipe.weights.method.needs & GRADIENTS
        layers = layers_of(self.ready.source)
        if not needs or all(self.work.load(f"gradients-{i}") for i in range(len(layers))):
            return

        def keep(index: int, found: dict[str, dict[str, torch.Tensor]]) -> None:
            tensors = {
                f"{path}|{moment}": tensor
                for path, moments in found.items()
                for moment, tensor in moments.items()
            }
            self.work.save(f"gradients-{index}", tensors)

        windows = self.ready.corpus.calibration
        gradient_moments(
            network,
            windows[self.workers.share(len(windows))],
            {index: layer.shapes for index, layer in enumerate(layers)},
            needs,
            keep,
            self.work.directory,
            batch=self.recipe.calibration.batch,
            limit=int(self.recipe.calibration.host_memory_gib * _GIB),
            workers=self.workers,
            progress=self.progress,
        )
        self.workers.wait()

    def _shares(self, network: Network) -> Shares | None:
        """What the allocator decides after measuring; None where it needs no measurement."""
        allocator = self.recipe.weights.allocator
        if not allocator.asks:
            return None
        decided = self.work.load("shares")
        if decided is not None:
            return {path: Fraction(share) for path, share in decided[1].items()}
        layers = layers_of(self.ready.source)
        found = evidence.gather(
            self.recipe,
            network,
            layers,
            matrices_of(layers, self.recipe.weights.method),
            self._streams(network, held_out=False),
            self.ready.corpus.calibration,
            self.work,
            self.progress,
        )
        shares = allocator.shares(kept_of(self.recipe), found)
        said = json.dumps({path: str(share) for path, share in shares.items()})
        said = json.loads(self.workers.text_of_first(said))
        self.work.save("shares", {}, said)
        return {path: Fraction(share) for path, share in said.items()}

    def _caches(self, network: Network) -> CacheEvidence:
        """What the K/V budget decides by."""
        found = self.work.load("caches")
        if found is None:
            layers, windows = layers_of(self.ready.source), self.ready.corpus.calibration
            streams = self._streams(network, held_out=False)
            seen = cache_evidence.gather(
                self.recipe, network, layers, streams, windows, self.progress
            )
            of_first = self.workers.of_first
            tensors = {
                side: of_first(torch.stack([of_layer[i] for of_layer in seen.energies]))
                for i, side in enumerate(("key", "value"))
            }
            if seen.exchange is not None:
                tensors["exchange"] = of_first(torch.tensor(seen.exchange, dtype=torch.float64))
            self.work.save("caches", tensors, {})
            found = tensors, {}
        tensors = found[0]
        exchange = tensors.get("exchange")
        return CacheEvidence(
            list(zip(tensors["key"], tensors["value"], strict=True)),
            None if exchange is None else [(key, value) for key, value in exchange.tolist()],
        )

    def _measurements(self, scored: Fidelity, results: list[LayerResult]) -> Measurements:
        corpus, calibration = self.ready.corpus, self.recipe.calibration
        source = self.ready.source
        attention = source.family.attention
        return Measurements(
            base_model=source.public_name,
            text=Path(str(calibration.text)).name,
            text_sha256=self.ready.text_sha256,
            calibration_tokens=corpus.calibration.numel(),
            held_out_tokens=len(corpus.held_out),
            scored_tokens=scored.tokens,
            context=calibration.context,
            perplexity_dense=scored.perplexity_dense,
            perplexity=scored.perplexity,
            kl_to_dense=scored.kl,
            top1_agreement=scored.top1,
            matrices={path: e for result in results for path, e in result.errors.items()},
            caches={
                f"{layer.path}.{attention}": result.cache_error
                for layer, result in zip(layers_of(source), results, strict=True)
                if result.cache_error is not None
            },
            versions={name: version(name) for name in ("vllm-svd", "torch", "transformers")},
        )


def _as_made(ranks: RankPlan, made: Mapping[str, Module]) -> RankPlan:
    """The plan with what was made: a method may add corrections where it finds biases."""
    matrices = {
        path: plan.model_copy(update={"module": made.get(path, plan.module)})
        for path, plan in ranks.matrices.items()
    }
    return ranks.model_copy(update={"matrices": matrices})


def _bases(ready: PreparedRun, results: list[LayerResult]) -> dict[str, KVBases]:
    attention = ready.source.family.attention
    return {
        f"{layer.path}.{attention}": result.bases
        for layer, result in zip(layers_of(ready.source), results, strict=True)
        if result.bases is not None
    }
