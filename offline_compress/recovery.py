"""Fine-tuning of low-rank factors on the calibration text: every B with all A held, then every A.

After SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378, 3.3): the next-token loss of the whole
model, one side of the factors after the other, since both at once end higher in the paper. The
paper trains LoRA adapters of each side and merges them; here the sides themselves, which are small.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from offline_compress import reference
from offline_compress.calibration import Network, Workers
from offline_compress.calibration.gates import recomputed
from offline_compress.factors import Factors, LowRankFactors
from offline_compress.methods import Recovery
from offline_compress.progress import Progress
from offline_compress.workspace import Workspace
from vllm_svd.errors import SvdError

_SIDES = ("B", "A")
# Steps between two records of the work directory.
_RECORDED = 50
_RECORD = "recovery"


def recover(
    network: Network,
    factors: Mapping[str, Factors],
    windows: torch.Tensor,
    recovery: Recovery,
    *,
    batch: int,
    seed: int,
    workers: Workers,
    work: Workspace,
    progress: Progress,
) -> dict[str, LowRankFactors]:
    """The same ranks, fine-tuned in fp32 on `windows` [n, context], `batch` of them a step.

    Holds the whole model on the device, in its compute dtype, and of the side that is trained its
    gradient and two moments, in fp32; activations of one window, computed again layer by layer for
    the gradient. A killed run goes on from the last record in the work directory, on a CPU to the
    same bits. The factors are in the host's memory. Raises SvdError for a loss or a gradient that
    is not finite.
    """
    # fp16 would flush the gradients of a mean over many tokens to zero
    dtype = torch.bfloat16 if network.dtype == torch.float16 else network.dtype
    model = reference.load(network.source.directory, network.device, dtype)
    for path, found in factors.items():
        reference.install_factors(model, path, found)
    layers = {path: model.get_submodule(path) for path in factors}
    for layer in layers.values():
        for side in _SIDES:
            exact = getattr(layer, side).detach().to(torch.float32, copy=True)
            setattr(layer, side, nn.Parameter(exact, requires_grad=False))
    order = _order(len(windows), 2 * recovery.steps * batch, seed)
    record = work.load(_RECORD, network.device)
    tensors, done = record if record is not None else ({}, 0)
    for name, tensor in tensors.items():
        path, _, part = name.rpartition("|")
        if part in _SIDES:
            getattr(layers[path], part).data = tensor
    for number, side in enumerate(_SIDES):
        first, last = number * recovery.steps, (number + 1) * recovery.steps
        if done >= last:
            continue
        trained = {path: cast(nn.Parameter, getattr(layer, side)) for path, layer in layers.items()}
        adam = torch.optim.Adam(trained.values(), lr=recovery.lr)
        if done > first:
            _restore(adam, trained, tensors, done - first)
        tensors = {}
        for step in range(max(done, first), last):
            for group in adam.param_groups:
                group["lr"] = recovery.lr * (last - step) / recovery.steps
            rows = order[step * batch : (step + 1) * batch]
            _gradients(model, network, windows[rows], trained, workers)
            adam.step()
            progress("recover", step + 1, 2 * recovery.steps)
            if (step + 1) % _RECORDED == 0 or step + 1 == last:
                work.save(_RECORD, _state(layers, adam, trained), step + 1)
        for parameter in trained.values():
            parameter.grad = None
    return {
        path: LowRankFactors(
            A=layer.A.detach().cpu(), B=layer.B.detach().cpu(), correction=factors[path].correction
        )
        for path, layer in layers.items()
    }


def _order(windows: int, draws: int, seed: int) -> torch.Tensor:
    """Numbers of windows [draws]: every window once before any of them twice."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-draws // windows)
    shuffled = [torch.randperm(windows, generator=generator) for _ in range(rounds)]
    return torch.cat(shuffled)[:draws]


def _gradients(
    model: PreTrainedModel,
    network: Network,
    windows: torch.Tensor,
    trained: Mapping[str, nn.Parameter],
    workers: Workers,
) -> None:
    """Set the gradient of the mean loss of `windows`, summed over what the workers have read."""
    with ExitStack() as patches, torch.enable_grad():
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
            parameter.requires_grad_(True)
            patches.callback(parameter.requires_grad_, False)
        for path in network.paths:
            patches.enter_context(recomputed(model.get_submodule(path)))
        for window in windows[workers.share(len(windows))]:
            ids = window[None].to(network.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = functional.cross_entropy(logits.float(), ids[0, 1:]) / len(windows)
            if not torch.isfinite(loss):
                raise SvdError(
                    "the loss of the compressed model is not finite while it is fine-tuned\n"
                    "Remedy: lower weights.method.recover.lr, or check the checkpoint"
                )
            loss.backward()  # type: ignore[no-untyped-call]
    for path, parameter in trained.items():
        gradient = workers.sum(cast(torch.Tensor, parameter.grad))
        if not torch.isfinite(gradient).all():
            raise SvdError(
                f"{path}: the gradient is not finite while its factors are fine-tuned\n"
                "Remedy: lower weights.method.recover.lr, or check the checkpoint"
            )


def _state(
    layers: Mapping[str, nn.Module], adam: torch.optim.Adam, trained: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    sides = {
        f"{path}|{side}": getattr(layer, side) for path, layer in layers.items() for side in _SIDES
    }
    moments = {
        f"{path}|{name}": adam.state[parameter][name]
        for path, parameter in trained.items()
        for name in ("exp_avg", "exp_avg_sq")
    }
    return sides | moments


def _restore(
    adam: torch.optim.Adam,
    trained: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    steps: int,
) -> None:
    for path, parameter in trained.items():
        adam.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": tensors[f"{path}|exp_avg"],
            "exp_avg_sq": tensors[f"{path}|exp_avg_sq"],
        }
