"""What the K/V budget asks of the model: energies of its channels, and what losing them costs."""

import math
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from offline_compress import kv, reference
from offline_compress.allocation import PROBE_WINDOWS, CacheEvidence, lost_energy, probe_of
from offline_compress.calibration import Network, Streams
from offline_compress.evaluation import divergence
from offline_compress.families import head_dim, soft_capped
from offline_compress.kv import KVBases
from offline_compress.methods import Layer
from offline_compress.progress import Progress
from offline_compress.recipe import CompressionRecipe
from vllm_svd.errors import SvdError
from vllm_svd.format import Side


@torch.no_grad()
def gather(
    recipe: CompressionRecipe,
    network: Network,
    layers: Sequence[Layer],
    streams: Streams,
    windows: torch.Tensor,
    progress: Progress,
) -> CacheEvidence:
    """One pass of the dense model, and for the measured allocator two probes of every layer.

    A probe caches the keys or the values of one layer of the dense model at a small size; its KL
    to the dense model, over the energy that it lost, is the exchange rate. The streams are spent.
    """
    source, budget = network.source, recipe.kv
    energies, probes = [], []
    for index in range(len(layers)):
        block, dense, rows = network.block(index), streams.dense, list(streams.calibrating())
        mode = budget.mode_of(index)
        statistics = kv.collect(network, index, block, dense, rows, streams, mode, budget.group)
        energies.append(kv.channel_energies(statistics))
        if budget.allocator == "measured":
            size = source.config.num_key_value_heads, head_dim(source.config)
            projection = probe_of(energies[-1], budget, mode, *size, source.item_bytes)
            bases = kv.project(statistics, projection, source.torch_dtype)
            probes.append(bases.to(source.torch_dtype).map(streams.workers.of_first))
        for batch in rows:
            dense.write(batch, network.forward(index, block, dense.read(batch, network.device)))
        progress("measure caches", index + 1, len(layers))
    streams.remove()
    if not probes:
        return CacheEvidence(energies)
    exchange = list(_exchange(network, layers, probes, energies, windows[:PROBE_WINDOWS], progress))
    return CacheEvidence(energies, exchange)


def _exchange(
    network: Network,
    layers: Sequence[Layer],
    probes: Sequence[KVBases],
    energies: Sequence[tuple[torch.Tensor, torch.Tensor]],
    windows: torch.Tensor,
    progress: Progress,
) -> Iterator[tuple[float, float]]:
    """Nats per token and unit of lost energy, of keys and of values, layer by layer."""
    source = network.source
    family, model = source.family, reference.load(source.directory, network.device, network.dtype)
    hidden = [_hidden(model, window) for window in windows]

    def head(states: torch.Tensor) -> torch.Tensor:
        return soft_capped(model.get_output_embeddings()(states), model.config)

    def rate(index: int, side: Side, energy: torch.Tensor) -> float:
        path, bases = layers[index].path, probes[index]
        layer, where = model.get_submodule(path), f"{path}.{family.attention}"
        with reference.kv_installed(layer, family, where, bases, side):
            pairs = (
                (before, _hidden(model, window))
                for before, window in zip(hidden, windows, strict=True)
            )
            nats = divergence(head, pairs)
        if not math.isfinite(nats):
            raise SvdError(
                f"{where}: the KL of a probe of its cache is {nats}\nRemedy: check the checkpoint, "
                "or give --kv-allocator uniform"
            )
        lost = lost_energy(energy, *bases.config.latent(side))
        return nats / lost if lost > 0 else 0.0

    for index, (key, value) in enumerate(energies):
        yield rate(index, "key", key), rate(index, "value", value)
        progress("probe caches", index + 1, len(layers))


def _hidden(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """What the head reads of one window, [context, hidden]."""
    found = model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    states: torch.Tensor = found.last_hidden_state[0]
    return states
