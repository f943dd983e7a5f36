"""The calibration loss with every linear layer softly truncated at a real position.

After Dobi-SVD (Wang et al., ICLR 2025, arXiv 2502.02723): the outputs a = x W^T [tokens, m] of a
layer, without its bias, become U diag(g s) V^T of their own SVD, or, in a basis that all windows
share, a U diag(g) U^T with U [m, q] the leading eigenvectors of W C W^T. The second needs no SVD,
and is the truncation that compression will make. g_i = 0.5 tanh(beta (k - i)) + 0.5.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from offline_compress.families import layer_paths
from offline_compress.linalg.stable_svd import soft_gate, soft_truncated
from vllm_svd.errors import SvdError

Truncate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GatedModel:
    """Next-token cross-entropy of a dense model on windows [samples, context], by positions.

    `bases` are U [m, q] by path, q above the largest position that will be asked for; "activations"
    needs none. Raises SvdError for windows without a token to predict. With `checkpointing` only
    the inputs of decoder layers are kept for the gradient, and each layer runs twice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        beta: float,
        mode: Literal["activations", "spectrum"] = "spectrum",
        bases: Mapping[str, torch.Tensor] | None = None,
        checkpointing: bool = False,
    ) -> None:
        if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
            raise SvdError(
                f"calibration windows of shape {list(windows.shape)} hold no token to predict\n"
                "Remedy: give token ids [samples, context] with a context of at least 2"
            )
        self.model, self.windows, self.beta, self.mode = model, windows, beta, mode
        self.bases, self.checkpointing = bases or {}, checkpointing

    def __call__(self, positions: Mapping[str, torch.Tensor], window: int) -> torch.Tensor:
        """Mean nats per token of one window, every matrix in `positions` truncated at its own.

        The gradient is taken here, where the gates are in place for layers that run twice; what is
        returned is the loss as a linear function of the positions, exact in value and slope.
        """
        leaves = {
            path: position.detach().to(self.model.device).requires_grad_(position.requires_grad)
            for path, position in positions.items()
        }
        learned = {path: leaf for path, leaf in leaves.items() if leaf.requires_grad}
        with _frozen(self.model), ExitStack() as patches, torch.set_grad_enabled(bool(learned)):
            for path, leaf in leaves.items():
                gate = partial(_gated, self._truncation(path), leaf)
                hook = self.model.get_submodule(path).register_forward_hook(gate)
                patches.callback(hook.remove)
            if self.checkpointing and learned:
                for path in layer_paths(self.model.config):
                    patches.enter_context(recomputed(self.model.get_submodule(path)))
            loss = self._loss(window)
            slopes = _slopes(loss, learned)
        found = loss.detach()
        for path, slope in slopes.items():
            position = positions[path]
            found = found.to(position) + slope.to(position) * (position - position.detach())
        return found

    def _loss(self, window: int) -> torch.Tensor:
        ids = self.windows[window : window + 1].to(self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(wide), ids[0, 1:])

    def _truncation(self, path: str) -> Truncate:
        if self.mode == "activations":
            return partial(_own, self.beta)
        return partial(_shared, self.beta, self.bases[path])


def _own(beta: float, position: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """In the singular vectors of the outputs [..., m] themselves."""
    return soft_truncated(output.flatten(0, -2), position, beta).view_as(output)


def _shared(
    beta: float, basis: torch.Tensor, position: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """In the basis U [m, q]."""
    gates = soft_gate(position, basis.shape[1], beta).to(output)
    basis = basis.to(output)
    return (output @ basis * gates) @ basis.T


def _gated(
    truncate: Truncate, position: torch.Tensor, linear: nn.Linear, _: Any, output: torch.Tensor
) -> torch.Tensor:
    """Forward hook: the bias is no part of what is truncated."""
    if linear.bias is None:
        return truncate(position, output)
    return truncate(position, output - linear.bias) + linear.bias


def _slopes(loss: torch.Tensor, learned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Derivative of the loss by path; zero for an expert that no token of the window reached."""
    if not loss.requires_grad:
        return {path: torch.zeros_like(leaf) for path, leaf in learned.items()}
    leaves = list(learned.values())
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(learned, slopes, strict=True))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of weights, nor what it would keep in memory."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def recomputed(layer: Any) -> Iterator[None]:
    """The layer forgets its activations and computes them again for the gradient."""
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        del layer.forward
