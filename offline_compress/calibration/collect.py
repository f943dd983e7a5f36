"""One pass of the streams through a block gives the statistics of its linear layers' inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from offline_compress.calibration.distributed import Workers
from offline_compress.calibration.hidden_states import HiddenStates, micro_batches
from offline_compress.calibration.moments import InputMoments
from offline_compress.calibration.network import Network, weight_of
from offline_compress.calibration.statistics import SHIFTED, LayerStatistics, Needs
from vllm_svd.errors import SvdError


@dataclass(frozen=True)
class Streams:
    """Hidden states before a block: of the dense model, and of the one compressed so far.

    The first `calibration` samples of this worker are the calibration set, the rest is held out.
    """

    dense: HiddenStates
    compressed: HiddenStates
    calibration: int
    batch: int
    workers: Workers

    def remove(self) -> None:
        """Give back the memory and the files of both streams."""
        self.dense.remove()
        self.compressed.remove()

    def calibrating(self) -> Iterator[slice]:
        """Micro-batches of the calibration set."""
        return micro_batches(0, self.calibration, self.batch)

    def held_out(self) -> Iterator[slice]:
        """Micro-batches of the samples that nothing is computed from."""
        return micro_batches(self.calibration, len(self.dense), self.batch)

    def every(self) -> Iterator[slice]:
        """All micro-batches; none mixes calibration with what is held out."""
        yield from self.calibrating()
        yield from self.held_out()


@contextmanager
def inputs_of(block: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """The last input of each linear layer while `block` runs; `paths` maps names to its modules.

    A layer that was not called, an expert without tokens, has no entry: clear between calls.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    hooks = [
        block.get_submodule(module).register_forward_pre_hook(keep(name))
        for name, module in paths.items()
    ]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def collect(
    network: Network,
    index: int,
    dense: nn.Module,
    compressed: nn.Module,
    streams: Streams,
    widths: Mapping[str, int],
    needs: Needs,
) -> dict[str, LayerStatistics]:
    """What a method needs of the inputs of the linear layers `widths` (path: n) of one block.

    Without needs nothing runs; the compressed block does only where `needs` names moments of its
    inputs. Raises SvdError for a calibration set without tokens, and ActivationError for inputs
    that are not finite.
    """
    if not needs:
        return {path: LayerStatistics() for path in widths}
    samples = torch.tensor([float(streams.calibration)], device=network.device)
    if not streams.workers.sum(samples):  # one worker alone may have none
        raise SvdError("the calibration set holds no samples\nRemedy: raise --samples")
    prefix = f"{network.paths[index]}."
    modules = {path: path.removeprefix(prefix) for path in widths}
    moments = {
        path: InputMoments(width, network.device, needs, paired=".experts." not in path)
        for path, width in widths.items()
    }
    shifted = bool(needs & SHIFTED)
    with inputs_of(dense, modules) as seen, inputs_of(compressed, modules) as seen_there:
        for rows in streams.calibrating():
            seen.clear()
            seen_there.clear()
            network.forward(index, dense, streams.dense.read(rows, network.device))
            if shifted:
                hidden = streams.compressed.read(rows, network.device)
                network.forward(index, compressed, hidden)
            for path, moment in moments.items():
                if path in seen or path in seen_there:
                    nothing = torch.empty(0, widths[path], device=network.device)
                    there = seen_there.get(path, nothing) if shifted else None
                    moment.add(seen.get(path, nothing), there)
    return {path: moment.statistics(path, streams.workers) for path, moment in moments.items()}


@torch.no_grad()
def channel_energies(
    network: Network, index: int, block: nn.Module, streams: Streams, modules: Iterable[str]
) -> list[torch.Tensor]:
    """E[y^2] per channel [heads, d] of the queries or keys that `modules` give, in fp64."""
    size, config = network.head_dim, network.config
    key = network.source.family.key_output
    sums = {  # on a worker without samples, too
        name: torch.zeros(
            config.num_key_value_heads if name == key else config.num_attention_heads,
            size,
            dtype=torch.float64,
            device=network.device,
        )
        for name in modules
    }
    counted = torch.zeros(1, dtype=torch.float64, device=network.device)

    def add(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            y = output.detach().double().flatten(0, 1).reshape(-1, output[0, 0].numel())
            sums[name] += y.square().sum(0).view(-1, size)

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(add(name)) for name in sums]
    try:
        for rows in streams.calibrating():
            hidden = streams.dense.read(rows, network.device)
            counted += hidden.shape[0] * hidden.shape[1]
            network.forward(index, block, hidden)
    finally:
        for handle in hooks:
            handle.remove()
    streams.workers.sum(counted)
    return [streams.workers.sum(total) / counted for total in sums.values()]


@torch.no_grad()
def held_out_errors(
    network: Network,
    index: int,
    block: nn.Module,
    streams: Streams,
    approximations: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
) -> dict[str, float]:
    """Relative output error of each approximation of a linear layer, on inputs it never saw.

    The sum of ||W x - W' x||^2 over that of ||W x||^2 on the dense block's own inputs, bias left
    out, a correction included.
    """
    prefix = f"{network.paths[index]}."
    modules = {path: path.removeprefix(prefix) for path in approximations}
    sums = {
        path: torch.zeros(2, dtype=torch.float64, device=network.device) for path in approximations
    }
    with inputs_of(block, modules) as seen:
        for rows in streams.held_out():
            seen.clear()
            network.forward(index, block, streams.dense.read(rows, network.device))
            for path, x in seen.items():
                weight = weight_of(block, modules[path])
                exact = nn.functional.linear(x, weight).float()
                rebuilt = approximations[path](x).float()
                lost = (exact - rebuilt).double().square().sum()
                sums[path] += torch.stack([lost, exact.double().square().sum()])
    found = {}
    for path, total in sums.items():
        lost, energy = streams.workers.sum(total).tolist()
        found[path] = lost / energy if energy else 0.0
    return found
