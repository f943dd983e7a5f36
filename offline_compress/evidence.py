"""What allocators ask of the model: spectra, block influence, losses of truncated models."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from offline_compress import reference
from offline_compress.allocation import LOSS_WINDOWS, Asks, Evidence, Learned, Matrix, Offer
from offline_compress.calibration import (
    SHIFTED,
    LayerStatistics,
    Network,
    Streams,
    collect,
    finite_weight,
    weight_of,
)
from offline_compress.calibration.gates import GatedModel
from offline_compress.methods import Layer, LowRankMethod, Method, OfferingMethod
from offline_compress.methods.dobi_svd import output_subspace
from offline_compress.progress import Progress
from offline_compress.recipe import CompressionRecipe
from offline_compress.workspace import Workspace
from vllm_svd.format import LowRank, LowRankInt8


@dataclass(frozen=True)
class _Measured:
    spectra: dict[str, torch.Tensor] = field(default_factory=dict)
    influence: list[float] = field(default_factory=list)
    menus: dict[str, list[Offer]] = field(default_factory=dict)


def gather(
    recipe: CompressionRecipe,
    network: Network,
    layers: list[Layer],
    matrices: Mapping[str, Matrix],
    streams: Streams,
    windows: torch.Tensor,
    work: Workspace,
    progress: Progress,
) -> Evidence:
    """Everything that the recipe's allocator asks for; the streams are spent."""
    allocator, method = recipe.weights.allocator, recipe.weights.method
    asks = allocator.asks
    keep = bool(asks & {"losses", "gates"})
    multiple = recipe.weights.rank_multiple
    measured = _sweep(network, method, layers, streams, work, asks, multiple, progress)
    streams.remove()
    evidence = Evidence(
        matrices,
        spectra=measured.spectra or None,
        influence=measured.influence,
        menus=measured.menus or None,
        windows=len(windows),
        rank_multiple=multiple,
        progress=progress,
    )
    if not keep:
        return evidence
    assert isinstance(method, LowRankMethod)  # the plan has refused others
    model = reference.load(network.source.directory, network.device, network.dtype)
    losses = _Losses(model, method, layers, network, work, windows[:LOSS_WINDOWS])
    gated = None
    if isinstance(allocator, Learned):
        gated = losses.gated(windows, matrices, allocator.beta)
    return replace(evidence, loss=losses if "losses" in asks else None, gated=gated)


@torch.no_grad()
def _sweep(
    network: Network,
    method: Method,
    layers: list[Layer],
    streams: Streams,
    work: Workspace,
    asks: frozenset[Asks],
    multiple: int,
    progress: Progress,
) -> _Measured:
    """One pass of the dense model; statistics for losses and gates stay in the work directory."""
    source, measured = network.source, _Measured()
    observed = source.family.input_sites(source.config)
    for index, layer in enumerate(layers):
        block = network.block(index)
        widths = {observed[path]: shape[1] for path, shape in layer.shapes.items()}
        if asks - {"influence"}:
            seen = collect(network, index, block, block, streams, widths, method.needs_before)
            gradients = load_gradients(work, index, network.device)
            for path in layer.shapes:
                statistics = with_moments(seen[observed[path]], gradients.get(path, {}))
                weight = finite_weight(block, path, f"{layer.path}.")
                if isinstance(method, LowRankMethod) and "spectra" in asks:
                    energy = method.spectrum(weight.detach(), statistics)
                    measured.spectra[path] = (energy * max(statistics.tokens, 1)).cpu()
                elif isinstance(method, OfferingMethod) and "menus" in asks:
                    offers = method.menu(layer, path, weight.detach(), statistics, multiple)
                    measured.menus[path] = [Offer(*offer) for offer in offers]
            if asks & {"losses", "gates"}:
                _save(work, index, seen)
        similarity = torch.zeros(2, dtype=torch.float64, device=network.device)
        for rows in streams.calibrating():
            before = streams.dense.read(rows, network.device)
            behind = network.forward(index, block, before)
            cosines = functional.cosine_similarity(before.double(), behind.double(), dim=-1)
            similarity += torch.stack([cosines.sum(), torch.ones_like(cosines).sum()])
            streams.dense.write(rows, behind)
        total, count = streams.workers.sum(similarity).tolist()
        measured.influence.append(1 - total / count)
        progress("measure", index + 1, len(layers))
    return measured


def with_moments(statistics: LayerStatistics, moments: Mapping[str, Any]) -> LayerStatistics:
    """The statistics of a matrix: those of its input, and its own gradient moments."""
    return replace(statistics, **moments)


def load_gradients(
    work: Workspace, index: int, device: torch.device
) -> dict[str, dict[str, torch.Tensor]]:
    """Gradient moments of a layer by path and moment; empty where none were taken."""
    record = work.load(f"gradients-{index}", device)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in (record[0] if record else {}).items():
        path, _, moment = name.rpartition("|")
        found.setdefault(path, {})[moment] = tensor
    return found


def _save(work: Workspace, index: int, seen: Mapping[str, LayerStatistics]) -> None:
    tensors = {
        f"{site}|{name}": value
        for site, statistics in seen.items()
        for name, value in vars(statistics).items()
        if isinstance(value, torch.Tensor)
    }
    work.save(f"statistics-{index}", tensors, {s: seen[s].tokens for s in seen})


class _Losses:
    """Calibration losses of the model with single matrices truncated."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: LowRankMethod,
        layers: list[Layer],
        network: Network,
        work: Workspace,
        windows: torch.Tensor,
    ) -> None:
        self.model, self.method, self.layers, self.work = model, method, layers, work
        self.windows, self.device = windows, network.device
        self.observed = network.source.family.input_sites(network.source.config)
        self._layer: tuple[int, dict[str, LayerStatistics]] | None = None

    @torch.no_grad()
    def __call__(self, shares: Mapping[str, Fraction]) -> float:
        """Mean nats per token with these matrices at these shares, the others dense."""
        kept: dict[str, torch.Tensor] = {}
        try:
            for path, share in shares.items():
                weight = weight_of(self.model, path)
                layer = self.layers[self._index(path)]
                module = self.method.modules_at(layer, {path: share})[path]
                if isinstance(module, LowRank | LowRankInt8):
                    found = self.method.factorize(weight, self.statistics(path), module.rank)
                    kept[path] = weight.data
                    weight.data = found.factors.dense().to(weight)
            return self._loss()
        finally:
            for path, data in kept.items():
                weight_of(self.model, path).data = data

    def statistics(self, path: str) -> LayerStatistics:
        """Of one matrix, from the work directory; those of one layer are held at a time."""
        index = self._index(path)
        if self._layer is None or self._layer[0] != index:
            record = self.work.load(f"statistics-{index}", self.device)
            assert record is not None  # written by the sweep of this very run
            by_site: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in record[0].items():
                site, _, moment = name.rpartition("|")
                by_site.setdefault(site, {})[moment] = tensor
            gradients = load_gradients(self.work, index, self.device)
            found = {}
            for other in self.layers[index].shapes:
                site = self.observed[other]
                moments = by_site.get(site, {})
                seen = LayerStatistics(tokens=record[1][site], **moments)
                if self.method.needs & SHIFTED:  # in the dense model x' is x
                    gram = moments.get("gram")
                    seen = replace(
                        seen,
                        shifted_mean=moments.get("mean"),
                        shifted_gram=gram,
                        shift=None if gram is None else torch.zeros_like(gram),
                    )
                found[other] = with_moments(seen, gradients.get(other, {}))
            self._layer = (index, found)
        return self._layer[1][path]

    def gated(
        self, windows: torch.Tensor, matrices: Mapping[str, Matrix], beta: float
    ) -> GatedModel:
        """The loss, differentiable in truncation positions, in the output basis of the method."""
        bases = {}
        for path, matrix in matrices.items():
            weight = self.model.get_submodule(path).weight.detach()
            seen = self.statistics(path)
            largest = min(matrix.rows, matrix.columns)
            if seen.gram is not None:
                basis = output_subspace(weight, seen.gram, largest).basis
            else:  # the span of what the method would make, leading directions first
                factors = self.method.factorize(weight, seen, largest).factors
                basis, _ = torch.linalg.qr(factors.parts()["B"].double())
            bases[path] = basis.to(weight)
        return GatedModel(
            self.model, windows, beta, mode="spectrum", bases=bases, checkpointing=True
        )

    def _loss(self) -> float:
        total = counted = 0.0
        for window in self.windows:
            ids = window[None].to(self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
            total += float(losses.double().sum())
            counted += losses.numel()
        return total / counted

    def _index(self, path: str) -> int:
        return next(i for i, layer in enumerate(self.layers) if path in layer.shapes)
