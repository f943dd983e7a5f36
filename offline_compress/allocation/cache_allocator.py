"""One budget of cache bytes, spent over layers, keys and values, ranks and bits."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offline_compress.allocation.cache_menu import Latent, Offer, Slot, largest_within, menu, slots
from offline_compress.allocation.kv_budget import KVBudget

# Windows of the calibration text that every probe of a layer reads.
PROBE_WINDOWS = 8
# Layers whose pages have one shape are one attention group of a server; few groups are fast.
SHAPES = 4
# Of the largest: a layer that a probe found harmless may still matter on other text.
_LEAST_EXCHANGE = 1e-3


@dataclass(frozen=True)
class CacheEvidence:
    """Of every layer what its key and its value channels hold, and what losing it costs.

    `energies`: [groups, channels] each, strongest first (kv.channel_energies).
    `exchange`: KL to the dense model in nats per token, over the energy that a probe lost; None
    where the allocator did not ask for it.
    """

    energies: Sequence[tuple[torch.Tensor, torch.Tensor]]
    exchange: Sequence[tuple[float, float]] | None = None


def spread(
    evidence: CacheEvidence, budget: KVBudget, sizes: tuple[float, float], item_bytes: int
) -> list[tuple[Latent, Latent]]:
    """Key and value latent of every layer; `sizes` are bytes of each that uniform would give.

    `uniform` cuts all layers alike, where the energy they lose is least on average over layers, as
    a fraction of what each holds; what keys leave of `kept` is the values'. `measured` spends
    the bytes of all layers and both sides together by damage: lost energy times its exchange rate,
    with at most SHAPES shapes of a page.
    """
    if evidence.exchange is None:
        fractions = [
            [energy / energy.sum().clamp_min(1e-300) for energy in pair]
            for pair in evidence.energies
        ]
        keys, values = _menus(fractions, budget, item_bytes)
        key = largest_within(keys, sizes[0])
        given = budget.k_kept or budget.v_kept
        slot = largest_within(slots([key], values), key.bytes + sizes[1] if given else sum(sizes))
        return [(slot.key, slot.value)] * len(evidence.energies)
    damages = _damages(evidence)
    total = sum(sizes) * len(damages)
    alone = [[layer] for layer in range(len(damages))]
    clusters = alone
    if len(alone) > SHAPES:
        chosen = _spent(alone, damages, budget, total, item_bytes)
        clusters = _clusters(
            [[side.bytes(item_bytes) for side in (slot.key, slot.value)] for slot in chosen]
        )
    chosen = _spent(clusters, damages, budget, total, item_bytes)
    of_layer = {
        layer: (slot.key, slot.value)
        for cluster, slot in zip(clusters, chosen, strict=True)
        for layer in cluster
    }
    return [of_layer[layer] for layer in range(len(damages))]


def _damages(evidence: CacheEvidence) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Energies in nats."""
    assert evidence.exchange is not None
    largest = max(max(pair) for pair in evidence.exchange)
    return [
        (
            key * max(rates[0], _LEAST_EXCHANGE * largest),
            value * max(rates[1], _LEAST_EXCHANGE * largest),
        )
        for (key, value), rates in zip(evidence.energies, evidence.exchange, strict=True)
    ]


def _spent(
    clusters: Sequence[Sequence[int]],
    damages: Sequence[tuple[torch.Tensor, torch.Tensor]],
    budget: KVBudget,
    total: float,
    item_bytes: int,
) -> list[Slot]:
    """Key and value of each cluster, whose layers all get the same."""
    menus = [
        slots(*_menus([damages[layer] for layer in cluster], budget, item_bytes))
        for cluster in clusters
    ]
    return _greedy(menus, [len(cluster) for cluster in clusters], total)


def _menus(
    energies: Sequence[Sequence[torch.Tensor]], budget: KVBudget, item_bytes: int
) -> tuple[list[Offer], list[Offer]]:
    """Of keys and of values, for layers that are cut alike; `energies` are pairs of both."""
    keys, values = (
        menu(torch.cat(side), budget.store, budget.rank_multiple, item_bytes)
        for side in zip(*energies, strict=True)
    )
    return keys, values


def _greedy(menus: Sequence[list[Slot]], counts: Sequence[int], total: float) -> list[Slot]:
    """The offer of each menu; those of `counts` layers cost as often.

    The best gain per byte first: optimal up to the last step on the convex hulls. An offer that
    no longer fits closes its menu, whose best one that still fits is taken at the end.
    """
    chosen = [offers[0] for offers in menus]
    left = total - sum(count * offer.bytes for offer, count in zip(chosen, counts, strict=True))
    queue: list[tuple[float, int, Slot]] = []

    def push(item: int) -> None:
        now = chosen[item]
        larger = [offer for offer in menus[item] if offer.bytes > now.bytes]
        if larger:
            gains = [(now.lost - offer.lost) / (offer.bytes - now.bytes) for offer in larger]
            steepest = max(range(len(gains)), key=gains.__getitem__)
            heapq.heappush(queue, (-gains[steepest] / counts[item], item, larger[steepest]))

    for item in range(len(menus)):
        push(item)
    closed = []
    while queue:
        _, item, offer = heapq.heappop(queue)
        cost = counts[item] * (offer.bytes - chosen[item].bytes)
        if cost > left:
            closed.append(item)
            continue
        left -= cost
        chosen[item] = offer
        push(item)
    for item in closed:
        before = chosen[item]
        chosen[item] = largest_within(menus[item], before.bytes + left / counts[item])
        left -= counts[item] * (chosen[item].bytes - before.bytes)
    return chosen


def _clusters(sizes: Sequence[list[int]]) -> list[list[int]]:
    """At most SHAPES sets of layers of like page sizes: Ward's agglomeration of (K, V) bytes."""
    clusters = [[layer] for layer in range(len(sizes))]
    centres = [torch.tensor(pair, dtype=torch.float32) for pair in sizes]
    while len(clusters) > SHAPES:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]

        def growth(pair: tuple[int, int]) -> float:
            first, second = (len(clusters[i]) for i in pair)
            apart = torch.sum((centres[pair[0]] - centres[pair[1]]) ** 2)
            return float(apart) * first * second / (first + second)

        i, j = min(pairs, key=growth)
        weights = len(clusters[i]), len(clusters[j])
        centres[i] = (centres[i] * weights[0] + centres[j] * weights[1]) / sum(weights)
        clusters[i] += clusters.pop(j)
        centres.pop(j)
    return clusters
