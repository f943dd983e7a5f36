"""What the machine code multiplies with, as it wants it: made once per layer."""

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vllm_svd.kernels.kept import Source
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.native import LANES
from vllm_svd.kernels.native.places import in_pairs
from vllm_svd.kernels.paged_batch import Rope

_angles: MutableMapping[torch.Tensor, dict[tuple[int, int], torch.Tensor]]
_angles = WeakTensorKeyDictionary()


class Bases(NamedTuple):
    """Addresses and sizes by the names of the machine code, and the arrays to keep for them."""

    arguments: dict[str, int]
    arrays: tuple[Any, ...]
    stored: torch.dtype
    ups: Source
    rope: Rope | None

    def are_of(
        self,
        stored: torch.dtype,
        k_up: torch.Tensor | None,
        v_up: torch.Tensor | None,
        rope: Rope | None,
    ) -> bool:
        """Whether of these very tensors, as they are."""
        if self.stored != stored or not self.ups.holds(k_up, v_up):
            return False
        if self.rope is rope:
            return True
        if self.rope is None or rope is None:
            return False
        return self.rope.cos_sin is rope.cos_sin and self.rope.is_neox == rope.is_neox


def bases(
    layout: LatentLayout,
    stored: torch.dtype,
    k_up: torch.Tensor | None,
    v_up: torch.Tensor | None,
    rope: Rope | None,
) -> Bases:
    """k_up [KV heads, d, k_rank] and v_up [KV heads, d, v_rank] for latents of a dtype.

    With `rope` keys are rebuilt, their channels in the order of `channels`; from pairs of latent
    channels where the CPU multiplies bf16 and nothing is lost by it, but what is below 2^-126.
    """
    arguments: dict[str, int] = {}
    arrays: list[Any] = []
    if v_up is not None:
        values = _placed(_padded(v_up.transpose(1, 2), v_up.shape[1]))
        arrays.append(values)
        arguments |= {"v_up": values.data_ptr(), "v_up_stride_0": values.stride(0) * 4}
    if k_up is None:
        return Bases(arguments, tuple(arrays), stored, Source(k_up, v_up), rope)
    if rope is None:
        up = _padded(k_up, layout.k_rank)
    else:
        order = channels(rope, k_up.shape[1])
        turned = _placed(angles(rope.cos_sin, len(order)))
        used = np.array(order, dtype=np.int64)
        up = k_up.float()[:, order]
        up[:, [channel < 0 for channel in order]] = 0
        pairs = _pairs_for(layout, stored, k_up)
        spans = [[0, layout.k_rank]]
        by_matrix = pairs is not None and len(order) // 2 >= LANES and _has_matrix_units()
        if pairs is not None:
            up = torch.cat([_in_pairs(up, tier, by_matrix) for tier in pairs], dim=-1)
            ends = np.cumsum([0, *(len(tier) for tier in pairs)]).tolist()
            spans = [list(ends[i : i + 2]) for i in range(len(pairs))]
        of_spans = np.array(spans, dtype=np.int64)
        arrays += [turned, used, of_spans]
        arguments |= {
            **{"rebuilt": 1, "paired": pairs is not None, "width": len(order)},
            **{"by_matrix": by_matrix, "num_pairs": spans[-1][1]},
            **{"order": used.ctypes.data, "angles": turned.data_ptr()},
            **{"spans": of_spans.ctypes.data, "num_spans": len(spans)},
            "in_order": order == list(range(k_up.shape[1])),
        }
    up = _placed(up)
    arguments |= {"up": up.data_ptr()}
    arguments |= {f"up_stride_{dimension}": up.stride(dimension) * 4 for dimension in (0, 1)}
    return Bases(arguments, (*arrays, up), stored, Source(k_up, v_up), rope)


def channels(rope: Rope, width: int) -> list[int]:
    """Channels of a key such that RoPE pairs i with i + half of them all; -1 is no channel.

    Those that are not rotated are paired, too, and turned by no angle.
    """
    rotary_dim = rope.cos_sin.shape[1]
    pairs = [(i, i + rotary_dim // 2) for i in range(rotary_dim // 2)]
    if not rope.is_neox:
        pairs = [(i, i + 1) for i in range(0, rotary_dim, 2)]
    pairs += [(i, i + 1 if i + 1 < width else -1) for i in range(rotary_dim, width, 2)]
    return [pair[side] for side in (0, 1) for pair in pairs]


def angles(cos_sin: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines, then sines, as the pairs of `channels`: fp32 [positions / LANES + 1, width, LANES].

    One table for all layers that share cos_sin, as long as it lives.
    """
    known = _angles.setdefault(cos_sin, {})
    key = width, cos_sin.data_ptr()
    if key not in known:
        positions, rotary_dim = cos_sin.shape
        # One more than there are, since four vectors are turned for three.
        blocks, half = -(-positions // LANES) + 1, rotary_dim // 2
        table = torch.zeros(blocks * LANES, 2, width // 2, dtype=torch.float32)
        table[:, 0] = 1
        table[:positions, :, :half] = cos_sin.float().view(positions, 2, half)
        table = table.view(blocks, LANES, width).transpose(1, 2).contiguous()
        known.clear()
        known[key] = table
    return known[key]


def spreads() -> bool:
    """Whether this CPU decodes tiers by tables."""
    from vllm_svd.kernels.native import spread

    return spread.THERE


def _has_matrix_units() -> bool:
    from vllm_svd.kernels.native import matrix

    return matrix.THERE


def _pairs_for(
    layout: LatentLayout, stored: torch.dtype, k_up: torch.Tensor
) -> list[list[tuple[int, int]]] | None:
    from vllm_svd.kernels.native import pairs

    if not pairs.THERE or not torch.equal(k_up, k_up.bfloat16().to(k_up.dtype)):
        return None
    if layout.quantised:
        return in_pairs(layout.runs[0])
    if stored != torch.bfloat16 or layout.k_rank % 2:
        return None
    return [[(i, i + 1) for i in range(0, layout.k_rank, 2)]]


def _in_pairs(up: torch.Tensor, pairs: list[tuple[int, int]], tiled: bool) -> torch.Tensor:
    """Bases [.., rank], exact in bf16, as words [.., pairs] of two channels each.

    Zeros make whole tiles of them if `tiled`.
    """
    both = up[..., torch.tensor(pairs)].bfloat16().contiguous()
    words = both.view(torch.int32)[..., 0]
    return torch.nn.functional.pad(words, (0, -len(pairs) % LANES)) if tiled else words


def _padded(basis: torch.Tensor, columns: int) -> torch.Tensor:
    """In fp32, its rows in whole vectors."""
    return torch.nn.functional.pad(basis.float(), (0, -columns % LANES))


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """As the machine code reads it."""
    return tensor.contiguous()
