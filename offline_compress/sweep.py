"""The pass that compresses a model block by block, each on what the blocks before it give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from offline_compress import kv, reference
from offline_compress.allocation import RankPlan
from offline_compress.calibration import (
    GRADIENTS,
    SHIFTED,
    HiddenStates,
    LayerStatistics,
    Network,
    Streams,
    Workers,
    bias_of,
    channel_energies,
    collect,
    finite_weight,
    held_out_errors,
    stages,
)
from offline_compress.checkpoint.measurements import CacheError, MatrixError
from offline_compress.evidence import load_gradients, with_moments
from offline_compress.factors import DeltaFactors, Factors, of_parts
from offline_compress.kv import KVBases
from offline_compress.methods import Block, Layer, Method
from offline_compress.progress import Progress
from offline_compress.weights import Source
from offline_compress.workspace import Workspace
from vllm_svd.errors import SvdError
from vllm_svd.format import KVProjection, Module
from vllm_svd.format.config import module_of


class NumericalError(SvdError):
    """A result that is not finite."""


@dataclass(frozen=True)
class LayerResult:
    """What became of one decoder layer, in the dtype of the checkpoint, and what it lost."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    errors: Mapping[str, MatrixError] = field(default_factory=dict)
    bases: KVBases | None = None
    cache_error: CacheError | None = None

    @property
    def modules(self) -> dict[str, Module]:
        """The artefacts by the paths of their weights."""
        return {path: factors.config() for path, factors in self.factors.items()}

    def save(self, work: Workspace, name: str) -> None:
        """As a record of the work directory."""
        tensors: dict[str, torch.Tensor] = {}
        for path, factors in self.factors.items():
            tensors |= factors.tensors(path)
        if self.bases:
            tensors |= self.bases.tensors("kv")
        facts = {
            "modules": {path: config.model_dump() for path, config in self.modules.items()},
            "errors": {path: error.model_dump() for path, error in self.errors.items()},
            "projection": self.bases and self.bases.config.model_dump(),
            "cache_error": self.cache_error and self.cache_error.model_dump(),
        }
        work.save(name, tensors, facts)

    @classmethod
    def load(cls, work: Workspace, name: str) -> "LayerResult | None":
        """The record, or None where there is none."""
        found = work.load(name)
        if found is None:
            return None
        tensors, facts = found
        factors = {}
        for path, raw in facts["modules"].items():
            config = module_of(raw)
            names = config.tensors(path)
            factors[path] = of_parts(
                config, {full.removeprefix(f"{path}."): tensors[full] for full in names}
            )
        bases = None
        if facts["projection"]:
            projection = KVProjection.model_validate(facts["projection"])
            bases = KVBases(projection, *(tensors[full] for full in projection.tensors("kv")))
        return cls(
            factors,
            {path: MatrixError.model_validate(error) for path, error in facts["errors"].items()},
            bases,
            facts["cache_error"] and CacheError.model_validate(facts["cache_error"]),
        )


@dataclass(frozen=True)
class Sweep:
    """Everything that is the same for every block.

    With `known` results, one a block, their factors are installed in place of new ones.
    """

    network: Network
    method: Method
    ranks: RankPlan
    layers: list[Layer]
    streams: Streams
    work: Workspace
    base: Source | None = None
    known: Sequence[LayerResult] | None = None

    def run(self, progress: Progress) -> Iterator[LayerResult]:
        """One result per block; the streams are then behind the last one."""
        progress("compress", 0, len(self.layers))
        for index in range(len(self.layers)):
            dense, compressed = self.network.block(index), self.network.block(index)
            name = self.record(index)
            result = LayerResult.load(self.work, name)
            if result is None:
                result = self._compress(index, dense, compressed)
                result.save(self.work, name)
            else:
                self._install(index, compressed, self._on_base(result))
            self._advance(index, dense, compressed)
            progress("compress", index + 1, len(self.layers))
            # A device has room for a block, not for what became of all of them.
            host = {path: factors.map(torch.Tensor.cpu) for path, factors in result.factors.items()}
            yield replace(result, factors=host)

    def record(self, index: int) -> str:
        """The record of the work directory that holds the result of a block."""
        return f"block-{index}" if self.known is None else f"tuned-{index}"

    @torch.no_grad()
    def _advance(self, index: int, dense: nn.Module, compressed: nn.Module) -> None:
        device = self.network.device
        for rows in self.streams.every():
            for stream, block in (
                (self.streams.dense, dense),
                (self.streams.compressed, compressed),
            ):
                stream.write(rows, self.network.forward(index, block, stream.read(rows, device)))

    def _install(self, index: int, block: nn.Module, result: LayerResult) -> None:
        prefix = f"{self.network.paths[index]}."
        for path, factors in result.factors.items():
            reference.install_factors(block, path.removeprefix(prefix), factors)
        if result.bases is not None:
            family = self.network.source.family
            reference.install_kv(block, family, f"{prefix}{family.attention}", result.bases)

    def _on_base(self, result: LayerResult) -> LayerResult:
        """The same result, its deltas on the weights they are differences from."""
        if self.base is None:
            return result
        factors = {
            path: found.on(self.base.read(f"{path}.weight"))
            if isinstance(found, DeltaFactors)
            else found
            for path, found in result.factors.items()
        }
        return replace(result, factors=factors)

    def _compress(self, index: int, dense: nn.Module, compressed: nn.Module) -> LayerResult:
        made = self._made(index, dense, compressed)
        held_out: dict[str, float] = {}
        if made.factors and self.method.separable:
            approximations = {path: factor.apply for path, factor in made.factors.items()}
            held_out = held_out_errors(self.network, index, dense, self.streams, approximations)
        errors = {
            path: error.model_copy(update={"held_out": held_out.get(path)})
            for path, error in made.errors.items()
        }
        bases, cache_error = self._project(index, compressed, made.bases)
        return LayerResult(made.factors, errors, bases, cache_error)

    def _made(self, index: int, dense: nn.Module, compressed: nn.Module) -> LayerResult:
        """Factors of the block, installed in `compressed`; held-out errors are not measured yet.

        A method that reads the inputs of the compressed model sees each stage behind the ones
        before it; all others see the dense block once.
        """
        if self.known is not None:
            self._install(index, compressed, self.known[index])
            return self.known[index]
        source, needs = self.network.source, self.method.needs
        planned = self.ranks.compressed
        observed = source.family.input_sites(source.config)
        wanted = {path: planned[path] for path in self.layers[index].shapes if path in planned}
        sites = {observed[path]: None for path in wanted}
        gradients = (
            load_gradients(self.work, index, self.network.device) if needs & GRADIENTS else {}
        )
        factors: dict[str, Factors] = {}
        errors: dict[str, MatrixError] = {}
        bases = None
        for stage in stages(sites) if needs & SHIFTED else [list(sites)] if sites else []:
            part = {path: module for path, module in wanted.items() if observed[path] in stage}
            statistics = self._statistics(index, dense, compressed, part, gradients)
            done = self.method.compress(self._block(index, dense, statistics), part)
            del statistics  # before those of the next stage
            found = {path: self._stored(path, one.factors) for path, one in done.matrices.items()}
            self._install(index, compressed, LayerResult(found))
            factors |= found
            errors |= {
                path: MatrixError(predicted=one.loss, damping=one.damping)
                for path, one in done.matrices.items()
            }
            bases = done.bases or bases
        return LayerResult(factors, errors, bases)

    def _stored(self, path: str, exact: Factors) -> Factors:
        """In the dtype of the checkpoint, and those of the first worker."""
        return stored(path, exact, self.network.source).map(self.streams.workers.of_first)

    def _statistics(
        self,
        index: int,
        dense: nn.Module,
        compressed: nn.Module,
        wanted: Mapping[str, Module],
        gradients: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> dict[str, LayerStatistics]:
        """What the method needs of every matrix of `wanted`, whose inputs no other changes."""
        source, needs = self.network.source, self.method.needs - GRADIENTS
        observed = source.family.input_sites(source.config)
        widths = {observed[path]: module.in_features for path, module in wanted.items()}
        seen = collect(self.network, index, dense, compressed, self.streams, widths, needs)
        return {
            path: with_moments(seen[observed[path]], gradients.get(path, {})) for path in wanted
        }

    def _block(
        self, index: int, dense: nn.Module, statistics: Mapping[str, LayerStatistics]
    ) -> Block:
        family, layer = self.network.source.family, self.layers[index]
        inside = {path: path.removeprefix(f"{layer.path}.") for path in statistics}
        base = None
        if self.base is not None:
            base = {
                path: self.base.read(f"{path}.weight").to(self.network.device)
                for path in statistics
            }
        query = key = None
        if self.method.reads_attention:
            query, key = channel_energies(
                self.network, index, dense, self.streams, [family.query_output, family.key_output]
            )
        return Block(
            layer=layer,
            weights={path: finite_weight(dense, path, f"{layer.path}.") for path in statistics},
            biases={path: bias_of(dense, module) for path, module in inside.items()},
            statistics=statistics,
            base=base,
            query_energy=query,
            key_energy=key,
        )

    def _project(
        self, index: int, compressed: nn.Module, own: KVBases | None
    ) -> tuple[KVBases | None, CacheError | None]:
        """K/V bases of the block as it is compressed, and their error on held-out samples."""
        source = self.network.source
        path = f"{self.layers[index].path}.{source.family.attention}"
        projection = self.ranks.projected.get(path)
        if projection is None:
            return None, None

        def observe(hidden: HiddenStates, rows: Iterator[slice]) -> kv.KVStatistics:
            return kv.collect(
                self.network,
                index,
                compressed,
                hidden,
                list(rows),
                self.streams,
                projection.mode,
                projection.group,
            )

        states = self.streams.compressed
        dtype = source.torch_dtype
        bases = own or kv.project(observe(states, self.streams.calibrating()), projection, dtype)
        bases = bases.to(dtype).map(self.streams.workers.of_first)
        k_error, v_error = kv.kv_error(observe(states, self.streams.held_out()), bases)
        reference.install_kv(compressed, source.family, path, bases)
        return bases, CacheError(k_error=k_error, v_error=v_error)


def open_streams(
    network: Network,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    *,
    batch: int,
    limit: int,
    work: Workspace,
    workers: Workers,
) -> Streams:
    """Hidden states before the first block, of this worker's samples."""
    calibration, held_out = (
        windows[workers.share(len(windows))] for windows in (calibration, held_out)
    )
    windows = torch.cat([calibration, held_out])
    shape = (len(windows), windows.shape[1], network.config.hidden_size)
    dense, compressed = (
        HiddenStates(shape, network.dtype, work.directory, f"{name}-{workers.rank}", limit // 2)
        for name in ("dense", "compressed")
    )
    streams = Streams(dense, compressed, len(calibration), batch, workers)
    with torch.no_grad():
        for rows in streams.every():
            hidden = network.embed(windows[rows])
            dense.write(rows, hidden)
            compressed.write(rows, hidden)
    return streams


def stored(path: str, exact: Factors, source: Source) -> Factors:
    """The factors in the dtype of the checkpoint."""
    factors = exact.to(source.torch_dtype)
    for name, tensor in factors.tensors(path).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericalError(
                f"{name} is not finite in {source.dtype}\n"
                "Remedy: check the checkpoint for damaged weights, or store it in BF16 or F32"
            )
    return factors
