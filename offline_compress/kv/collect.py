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
    group: int = 1,
) -> KVStatistics:
    """Statistics of the attention of `block` over the micro-batches `rows` of its inputs.

    Of the `group` KV heads that share a latent only [g d, g d] moments are held, in fp64 on the
    model's device. Raises SvdError for no tokens at all, and for an activation that is not finite,
    naming the layer.
    """
    moments = _HeadMoments(network, index, block, mode, group, hidden.context)
    hooks = moments.hooks(network.source.family)
    try:
        for batch in rows:
            network.forward(index, block, hidden.read(batch, network.device))
    finally:
        for handle in hooks:
            handle.remove()
    return moments.statistics(streams)


class _HeadMoments:
    """Running sums of x x^T: [kv_heads, d, d] of queries, [groups, g d, g d] of keys and values."""

    def __init__(
        self, network: Network, index: int, block: nn.Module, mode: Mode, group: int, context: int
    ) -> None:
        self.config, self.block, self.mode = network.config, block, mode
        self.context = context  # known to a worker that has no sample, too
        family: Family = network.source.family
        self.path = f"{network.paths[index]}.{family.attention}"
        self.attention = block.get_submodule(family.attention)
        self.rope = Rope(network.rotary)
        self.heads, self.size = self.config.num_key_value_heads, network.head_dim
        self.group = group
        self.sums = {
            role: torch.zeros(
                self.heads // g, g * self.size, g * self.size, dtype=torch.float64
            ).to(network.device)
            for role, g in (("query", 1), ("key", group), ("value", group))
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
        if role == "query":
            x = x.permute(2, 0, 1, 3, 4).reshape(self.heads, -1, self.size)
        else:  # one head each: those of a group one after the other
            x = x.reshape(samples * context, -1, self.group * self.size).permute(1, 0, 2)
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
        output_metric = self._joined(torch.einsum("okgd,okge->kde", weight, weight))
        query = self._joined(query)
        return KVStatistics(
            mode=self.mode,
            key_moment=key.cpu(),
            query_metric=query.cpu(),
            value_moment=value.cpu(),
            output_metric=output_metric.cpu(),
            tokens=int(self.tokens),
        )

    def _joined(self, of_heads: torch.Tensor) -> torch.Tensor:
        """Block diagonal [groups, g d, g d] of matrices [kv_heads, d, d]."""
        count, size, _ = of_heads.shape
        joined = of_heads.new_zeros(count // self.group, self.group, size, self.group, size)
        for head, matrix in enumerate(of_heads):
            joined[head // self.group, head % self.group, :, head % self.group] = matrix
        return joined.flatten(1, 2).flatten(2)

    def _reach(self) -> int:
        """The farthest offset to sample: half the context, and never beyond a sliding window."""
        inherited = getattr(self.config, "sliding_window", None)
        window = getattr(self.attention, "sliding_window", inherited)
        return min(self.context // 2, window - 1 if window else self.context)
