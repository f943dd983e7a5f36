"""K/V channel projections of one attention layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from offline_compress.kv.basis import energies, solve, solve_tiers, weighted_error
from offline_compress.kv.statistics import KVStatistics
from vllm_svd.errors import SvdError
from vllm_svd.format import KVProjection, Tier


@dataclass(frozen=True)
class KVBases:
    """k_down [groups, k_rank, g d] and k_up [KV heads, d, k_rank]; the same for v.

    Cached are `k_down @ k` and `v_down @ v` of the heads of each group, one after the other;
    `k_up`, `v_up` rebuild the key of a head and its attention output.
    """

    config: KVProjection
    k_down: torch.Tensor
    k_up: torch.Tensor
    v_down: torch.Tensor
    v_up: torch.Tensor

    def to(self, dtype: torch.dtype) -> "KVBases":
        """The bases as they will be stored."""
        return self.map(lambda basis: basis.to(dtype))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "KVBases":
        """With every basis changed, not in shape."""
        return KVBases(self.config, *map(change, self._bases().values()))

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of the attention layer at `path`."""
        return {f"{path}.attn.{name}": basis.contiguous() for name, basis in self._bases().items()}

    def _bases(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}


def project(
    statistics: KVStatistics, config: KVProjection, dtype: torch.dtype = torch.float64
) -> KVBases:
    """The optimal bases of every group, in fp64; of tiers, for bases that will be kept in `dtype`.

    Raises SvdError if the statistics were collected for another mode or another shape.
    """
    collected = (statistics.mode, *statistics.key_moment.shape[:2])
    wanted = (config.mode, config.groups, config.group * config.head_dim)
    if collected != wanted:
        raise SvdError(
            f"statistics of mode {collected[0]}, {collected[1]} groups of {collected[2]} channels "
            f"cannot serve a projection of mode {wanted[0]}, {wanted[1]} groups of {wanted[2]}\n"
            "Remedy: collect the statistics again for this projection"
        )
    k_up, k_down = _solved(
        statistics.query_metric, statistics.key_moment, config.k_rank, config.k_tiers, dtype
    )
    v_up, v_down = _solved(
        statistics.output_metric, statistics.value_moment, config.v_rank, config.v_tiers, dtype
    )
    k_up, v_up = (up.view(config.num_kv_heads, config.head_dim, -1) for up in (k_up, v_up))
    return KVBases(config, k_down, k_up, v_down, v_up)


def channel_energies(statistics: KVStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies [groups, g d] of the key's and of the value's channels, strongest first."""
    key = zip(statistics.query_metric, statistics.key_moment, strict=True)
    value = zip(statistics.output_metric, statistics.value_moment, strict=True)
    return (
        torch.stack([energies(*group) for group in key]),
        torch.stack([energies(*group) for group in value]),
    )


def kv_error(statistics: KVStatistics, bases: KVBases) -> tuple[float, float]:
    """Relative error of the attention scores and of the attention output, over all KV heads."""
    k_up, v_up = (
        up.reshape(bases.config.groups, -1, up.shape[2]) for up in (bases.k_up, bases.v_up)
    )
    return (
        weighted_error(
            statistics.query_metric,
            statistics.key_moment,
            k_up,
            bases.k_down,
            bases.config.k_tiers,
        ),
        weighted_error(
            statistics.output_metric,
            statistics.value_moment,
            v_up,
            bases.v_down,
            bases.config.v_tiers,
        ),
    )


def _solved(
    metrics: torch.Tensor,
    second_moments: torch.Tensor,
    rank: int,
    tiers: Sequence[Tier],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = zip(metrics, second_moments, strict=True)
    solved = [solve_tiers(*head, tiers, dtype) if tiers else solve(*head, rank) for head in heads]
    ups, downs = zip(*solved, strict=True)
    return torch.stack(ups), torch.stack(downs)
