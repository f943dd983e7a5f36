"""Moments of the loss's gradients with respect to the outputs of linear layers, block by block.

The forward pass keeps the hidden states between blocks, the backward pass computes each block
again: activation checkpointing at the borders of blocks, with the weights of one block on the
device. Gradients of weights are never stored: for a layer y = W x with g = dL/dy per token,
output_gram is E[g g^T] (token-wise, as in KFAC: Martens and Grosse, arXiv 1503.05671), and fisher
the squared gradient of a sample, G = sum_t g_t x_t^T, summed over the rows of W.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from offline_compress.calibration.distributed import Workers
from offline_compress.calibration.hidden_states import HOST_LIMIT, HiddenStates, micro_batches
from offline_compress.calibration.network import Network
from offline_compress.calibration.statistics import GRADIENTS, Needs
from offline_compress.progress import Progress, silent
from vllm_svd.errors import SvdError

Keep = Callable[[int, dict[str, dict[str, torch.Tensor]]], None]


@dataclass(frozen=True)
class _Call:
    inputs: torch.Tensor
    output: torch.Tensor


def gradient_moments(
    network: Network,
    windows: torch.Tensor,
    layers: Mapping[int, Mapping[str, tuple[int, int]]],
    needs: Needs,
    keep: Keep,
    directory: Path,
    *,
    batch: int,
    limit: int = HOST_LIMIT,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> None:
    """Hand `keep` the gradient moments of every layer (index: path: [m, n]), the last layer first.

    The loss of a window [context] is its summed next-token cross-entropy in nats. Raises SvdError
    for a gradient that is not finite.
    """
    workers = workers or Workers()
    if "fisher" in needs:
        batch = 1  # gradients are squared per sample, and experts mix the tokens of a batch
    suffix = f"-{workers.rank}"  # the directory is that of all workers
    borders = _forward(network, windows, directory, suffix, batch, limit, progress)
    upstream = _at_the_head(network, windows, borders.pop(), batch)
    total = len(network.paths)
    for index in reversed(range(total)):
        sums = _Sums(layers[index], needs, network.device)
        block, border = network.block(index), borders.pop()
        for rows in micro_batches(0, len(windows), batch):
            gradient = upstream.read(rows, network.device)
            hidden = border.read(rows, network.device).requires_grad_()
            prefix = f"{network.paths[index]}."
            with _calls(block, prefix, layers[index]) as calls, torch.enable_grad():
                output = network.forward(index, block, hidden)
                outputs = [hidden, *(call.output for call in calls.values())]
                found = torch.autograd.grad(output, outputs, gradient, allow_unused=True)
            upstream.write(rows, found[0])
            for (path, call), gradient in zip(calls.items(), found[1:], strict=True):
                sums.add(path, call.inputs, gradient)
        border.remove()
        keep(index, sums.means(len(windows), workers))
        progress("gradients", total - index, total)
    upstream.remove()


@torch.no_grad()
def _forward(
    network: Network,
    windows: torch.Tensor,
    directory: Path,
    suffix: str,
    batch: int,
    limit: int,
    progress: Progress,
) -> list[HiddenStates]:
    """Hidden states before every block and behind the last."""
    shape = (*windows.shape, network.config.hidden_size)
    count = len(network.paths) + 2  # and the gradient
    borders = [
        HiddenStates(shape, network.dtype, directory, f"border-{index}{suffix}", limit // count)
        for index in range(count - 1)
    ]
    for rows in micro_batches(0, len(windows), batch):
        borders[0].write(rows, network.embed(windows[rows]))
    for index in range(len(network.paths)):
        block = network.block(index)
        for rows in micro_batches(0, len(windows), batch):
            hidden = borders[index].read(rows, network.device)
            borders[index + 1].write(rows, network.forward(index, block, hidden))
        progress("forward", index + 1, len(network.paths))
    return borders


def _at_the_head(
    network: Network, windows: torch.Tensor, last: HiddenStates, batch: int
) -> HiddenStates:
    """The gradient of the summed loss with respect to the last hidden states, in their place."""
    for rows in micro_batches(0, len(windows), batch):
        hidden = last.read(rows, network.device).requires_grad_()
        with torch.enable_grad():
            logits = network.logits(hidden)[:, :-1].float()
            targets = windows[rows][:, 1:].to(network.device)
            loss = functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss, hidden)
        last.write(rows, gradient)
    return last


class _Sums:
    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], needs: Needs, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.fisher = {path: zeros(n) for path, (_, n) in shapes.items() if "fisher" in needs}
        self.grams = {
            path: zeros(m, m) for path, (m, _) in shapes.items() if "output_gram" in needs
        }
        self.tokens = {path: zeros(1) for path in shapes}
        self.device = device

    def add(self, path: str, x: torch.Tensor, gradient: torch.Tensor | None) -> None:
        x = x.detach().flatten(0, -2)
        g = torch.zeros(len(x), 1) if gradient is None else gradient.detach().flatten(0, -2)
        if not torch.isfinite(g).all():
            raise SvdError(
                f"the gradient at the output of {path} is not finite on the calibration text\n"
                "Remedy: check the checkpoint, or run it in a wider dtype (set dtype in its "
                "config.json to bfloat16 or float32)"
            )
        self.tokens[path] += len(x)
        if gradient is None:
            return
        if path in self.grams:
            self.grams[path].addmm_(g.double().T, g.double())
        if path in self.fisher:
            self.fisher[path] += (g.float().T @ x.float()).double().square().sum(0)

    def means(self, samples: int, workers: Workers) -> dict[str, dict[str, torch.Tensor]]:
        counted = workers.sum(torch.tensor([float(samples)], device=self.device))
        found: dict[str, dict[str, torch.Tensor]] = {path: {} for path in self.tokens}
        for path, tokens in self.tokens.items():
            workers.sum(tokens)
            if path in self.grams:
                gram = workers.sum(self.grams[path]) / tokens.clamp_min(1)
                found[path]["output_gram"] = (gram + gram.T) / 2
            if path in self.fisher:
                total = workers.sum(self.fisher[path])
                found[path]["fisher"] = total / counted
        assert all(set(moments) <= GRADIENTS for moments in found.values())
        return found


@contextmanager
def _calls(
    block: nn.Module, prefix: str, paths: Mapping[str, object]
) -> Iterator[dict[str, _Call]]:
    """What each linear layer received and gave in the last call, as nodes of its graph."""
    calls: dict[str, _Call] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls[path] = _Call(inputs[0], output)

        return hook

    hooks = [
        block.get_submodule(path.removeprefix(prefix)).register_forward_hook(keep(path))
        for path in paths
    ]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()
