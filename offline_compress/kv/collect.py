"""The moments of queries, keys and values of one block, as it is compressed so far."""

from collections.abc import Callable

import torch
from torch import nn

from offline_compress.calibration.collect import Streams
from offline_compress.calibration.hidden_states import HiddenStates
from offline_compress.calibration.network import Network, weight_of
from offline_compress.families import Family
from offline_compress.kv.rope import Rope
from offline_compress.kv.statistics import KVStatistics
from vllm_svd.errors import SvdError
from vllm_svd.format import Mode


@torch.no_grad()
def collect(
    network: Network,
    index: int,
    block: nn.Module,
    hidden: HiddenStates,
    rows: list[slice],
    streams: Streams,
    mode: Mode,
) -> KVStatistics:
    """Statistics of the attention of `block` over the micro-batches `rows` of its inputs.

    Only [d, d] moments per head are held, in fp64 on the model's device. Raises SvdError for no
    tokens at all, and for an activation that is not finite, naming the layer.
    """
    moments = _HeadMoments(network, index, block, mode, hidden.context)
    hooks = moments.hooks(network.source.family)
    try:
        for batch in rows:
            network.forward(index, block, hidden.read(batch, network.device))
    finally:
        for handle in hooks:
            handle.remove()
    return moments.statistics(streams)


class _HeadMoments:
    """Running sums [kv_heads, d, d] of x x^T for the query, key and value of one layer."""

    def __init__(
        self, network: Network, index: int, block: nn.Module, mode: Mode, context: int
    ) -> None:
        self.config, self.block, self.mode = network.config, block, mode
        self.context = context  # known to a worker that has no sample, too
        family: Family = network.source.family
        self.path = f"{network.paths[index]}.{family.attention}"
        self.attention = block.get_submodule(family.attention)
        self.rope = Rope(network.rotary)
        self.heads, self.size = self.config.num_key_value_heads, network.head_dim
        self.sums = {
            role: torch.zeros(
                self.heads, self.size, self.size, dtype=torch.float64, device=network.device
            )
            for role in ("query", "key", "value")
        }
        self.tokens = torch.zeros(1, dtype=torch.float64, device=network.device)

    def hooks(self, family: Family) -> list[torch.utils.hooks.RemovableHandle]:
        outputs = {
            "query": family.query_output,
            "key": family.key_output,
            "value": family.value_output,
        }
        return [
            self.block.get_submodule(module).register_forward_hook(self._observer(role))
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
        self.sums[role] += moment
        if role == "key":
            self.tokens += samples * context

    def statistics(self, streams: Streams) -> KVStatistics:
        for total in (self.tokens, *self.sums.values()):
            streams.workers.sum(total)
        if not self.tokens:
            raise SvdError(
                f"{self.path}: no tokens to take its K/V statistics from\n"
                "Remedy: raise --samples or evaluation.samples"
            )
        query, key, value = (self.sums[role] / self.tokens for role in ("query", "key", "value"))
        if self.mode == "pre":
            query = self.rope.read_metric(query, self._reach())
        # o_proj.weight [hidden, query_heads * d]
        weight = weight_of(self.attention, "o_proj").double()
        weight = weight.view(len(weight), self.heads, -1, self.size)
        output_metric = torch.einsum("okgd,okge->kde", weight, weight)
        return KVStatistics(
            mode=self.mode,
            key_moment=key.cpu(),
            query_metric=query.cpu(),
            value_moment=value.cpu(),
            output_metric=output_metric.cpu(),
            tokens=int(self.tokens),
        )

    def _reach(self) -> int:
        """The farthest offset to sample: half the context, and never beyond a sliding window."""
        inherited = getattr(self.config, "sliding_window", None)
        window = getattr(self.attention, "sliding_window", inherited)
        return min(self.context // 2, window - 1 if window else self.context)
