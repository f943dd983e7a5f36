"""One pass of a model over calibration windows: the moments of queries, keys and values."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_compress.allocation import Mode
from offline_compress.calibration.run import run
from offline_compress.families import Family, head_dim
from offline_compress.kv.rope import Rope
from offline_compress.kv.statistics import KVStatistics
from offline_compress.progress import Progress, silent
from vllm_svd.errors import SvdError


def collect(
    model: PreTrainedModel,
    family: Family,
    windows: torch.Tensor,
    modes: Mapping[str, Mode],
    batch: int,
    progress: Progress = silent,
) -> dict[str, KVStatistics]:
    """Statistics of every attention layer in `modes` (its path -> pre or post).

    `windows` are token ids [samples, context], run `batch` samples at a time; only [d, d] moments
    per head are held, in fp64 on the model's device. Raises SvdError for no windows, and for an
    activation that is not finite, naming the layer.
    """
    rope = Rope.of(model)
    moments = {path: _HeadMoments(model, path, mode, rope) for path, mode in modes.items()}
    hooks = [hook for layer in moments.values() for hook in layer.hooks(family)]
    run(model, windows, batch, hooks, progress, "K/V statistics")
    return {path: layer.statistics(*windows.shape) for path, layer in moments.items()}


class _HeadMoments:
    """Running sums [kv_heads, d, d] of x x^T for the query, key and value of one layer."""

    def __init__(self, model: PreTrainedModel, path: str, mode: Mode, rope: Rope) -> None:
        self.model, self.path, self.mode, self.rope = model, path, mode, rope
        self.heads, self.size = model.config.num_key_value_heads, head_dim(model.config)
        self.sums: dict[str, torch.Tensor] = {}

    def hooks(self, family: Family) -> list[torch.utils.hooks.RemovableHandle]:
        layer = self.model.get_submodule(self.path.removesuffix(f".{family.attention}"))
        outputs = {
            "query": family.query_output,
            "key": family.key_output,
            "value": family.value_output,
        }
        return [
            layer.get_submodule(module).register_forward_hook(self._observer(role))
            for role, module in outputs.items()
        ]

    def _observer(self, role: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def observe(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            self._add(role, output)

        return observe

    def _add(self, role: str, output: torch.Tensor) -> None:
        """`output` is [samples, context, heads * d], or with the heads already apart."""
        samples, context = output.shape[:2]
        # query head h reads KV head h // group, so heads unfold as [kv_heads, group]
        x = output.double().reshape(samples, context, self.heads, -1, self.size)
        if self.mode == "post" and role != "value":
            positions = torch.arange(context)
            x = self.rope.rotate(x.permute(0, 2, 3, 1, 4), positions).permute(0, 3, 1, 2, 4)
        x = x.permute(2, 0, 1, 3, 4).reshape(self.heads, -1, self.size)
        moment = x.mT @ x
        if not torch.isfinite(moment).all():
            raise SvdError(
                f"{self.path}: the {role} holds values that are not finite\n"
                "Remedy: check the checkpoint, or run the calibration in bfloat16 or float32"
            )
        self.sums[role] = self.sums[role] + moment if role in self.sums else moment

    @torch.inference_mode()
    def statistics(self, samples: int, context: int) -> KVStatistics:
        tokens = samples * context
        query, key, value = (self.sums[role] / tokens for role in ("query", "key", "value"))
        attention = self.model.get_submodule(self.path)
        if self.mode == "pre":
            query = self.rope.read_metric(query, self._reach(attention, context))
        # o_proj.weight [hidden, query_heads * d]
        weight = attention.o_proj.weight.double().unflatten(1, (self.heads, -1, self.size))
        output_metric = torch.einsum("okgd,okge->kde", weight, weight)
        return KVStatistics(
            mode=self.mode,
            key_moment=key.cpu(),
            query_metric=query.cpu(),
            value_moment=value.cpu(),
            output_metric=output_metric.cpu(),
            tokens=tokens,
        )

    def _reach(self, attention: nn.Module, context: int) -> int:
        """The farthest offset to sample: half the context, and never beyond a sliding window."""
        inherited = getattr(self.model.config, "sliding_window", None)
        window = getattr(attention, "sliding_window", inherited)
        return min(context // 2, window - 1 if window else context)
