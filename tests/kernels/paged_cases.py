"""Random ragged batches over paged caches of latents, and how near a kernel comes to fp64 there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_svd.format import Tier
from vllm_svd.kernels.latent_attention import reference
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch, Rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Tiers = tuple[tuple[int, str], ...]
"""Channels and store of each tier of one side."""


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    cache: torch.Tensor
    batch: PagedBatch
    settings: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the output."""
        v_up, rank = self.settings["v_up"], self.settings["layout"].v_rank
        return (*self.query.shape[:2], rank if v_up is None else v_up.shape[1])


def build(
    lengths: list[tuple[int, int]],
    *,
    kv_heads: int = 2,
    shared: int = 1,
    group: int = 2,
    d: int = 32,
    k_rank: int = 16,
    v_rank: int = 24,
    block: int = 16,
    mode: str = "pre",
    rotary_dim: int | None = None,
    neox: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float32,
    tiers: tuple[Tiers, Tiers] | None = None,
    magnitude: float = 1.0,
    heads_inside: bool = False,
    projects: bool = False,
    unused: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """`lengths` are (query tokens, tokens in the cache) per request.

    Slots that are not used hold NaN, entries of the block table `unused`. `shared` KV heads have
    one latent. Latents of one token are up to 16 times as large as those of another. The ranks are
    those of `tiers`, if any. With `projects` the kernel has the bases of queries and outputs.
    """
    g = torch.Generator().manual_seed(seed)
    rotary_dim = rotary_dim or d
    layout = LatentLayout(k_rank, v_rank)
    if tiers is not None:
        sides = [tuple(Tier(channels=c, store=store) for c, store in side) for side in tiers]
        ranks = [sum(tier.channels for tier in side) for side in sides]
        layout = LatentLayout(*ranks, *sides)
    groups, k_rank, v_rank = kv_heads // shared, layout.k_rank, layout.v_rank
    needed = [-(-length // block) for _, length in lengths]
    pages = torch.randperm(sum(needed) + 3, generator=g).to(torch.int32)
    cache = torch.full((len(pages), groups, block, layout.width), torch.nan, dtype=dtype)
    if layout.quantised:
        cache = torch.full_like(cache, 255, dtype=torch.uint8)  # scales that stand for NaN
    if heads_inside:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    columns = max(needed) + 2 * (unused > 0)
    table = torch.full((len(lengths), columns), unused, dtype=torch.int32)
    for request, (_, length) in enumerate(lengths):
        before = sum(needed[:request])
        mine = pages[before : before + needed[request]]
        table[request, : len(mine)] = mine
        latents = torch.randn(length, groups, k_rank + v_rank, generator=g)
        latents *= magnitude * 2 ** -(4 * torch.rand(length, groups, 1, generator=g))
        slots, at = latents.to(dtype), torch.arange(length)
        slots = layout.write(slots[..., :k_rank], slots[..., k_rank:])
        cache[mine[at // block].long(), :, at % block] = slots
    tokens = [query for query, _ in lengths]
    positions = torch.arange(max(length for _, length in lengths))
    angles = positions[:, None] / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    table_of_rope = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device, dtype)
    k_up, v_up = (
        torch.randn(kv_heads, d, rank, generator=g).div(rank**0.5).to(device, dtype)
        for rank in (k_rank, v_rank)
    )
    width = d if mode == "pre" or projects else k_rank
    return Case(
        torch.randn(sum(tokens), kv_heads * group, width, generator=g).to(device, dtype),
        cache.to(device),
        PagedBatch(
            torch.tensor([0, *tokens]).cumsum(0).to(device, torch.int32),
            torch.tensor([length for _, length in lengths], dtype=torch.int32, device=device),
            table.to(device),
            sum(tokens),
            max(tokens),
        ),
        {
            "scale": d**-0.5,
            "layout": layout,
            "k_up": k_up if mode == "pre" or projects else None,
            "v_up": v_up if projects else None,
            "rope": Rope(table_of_rope, neox) if mode == "pre" else None,
            "sliding_window": window,
            "soft_cap": soft_cap,
        },
    )


def check(
    run: Callable[[Case], torch.Tensor], *cases: Case, plain: torch.dtype = torch.float32
) -> None:
    """The error against fp64 (Frobenius norm) is at most twice that of the plain expression.

    That is the reference in the dtype in which the kernel multiplies; one rounding of the output to
    its own dtype is allowed beside it. Stored latents are what they decode to, in both. Errors of
    all cases together, so that the luck of a few roundings averages out.
    """
    errors, plain_errors, exacts = [], [], []
    for case in cases:
        arguments, device = (case.query, case.cache, case.batch), case.query.device
        exact = torch.empty(case.shape, dtype=torch.float64, device=device)
        reference.attend(*arguments, exact, **case.settings)
        expected = torch.empty(case.shape, dtype=torch.float32, device=device)
        reference.attend(*arguments, expected, **case.settings, dtype=plain)
        output = run(case)
        errors.append((output.double() - exact).flatten())
        plain_errors.append((expected.double() - exact).flatten())
        exacts.append(exact.flatten())
    rounding = torch.finfo(output.dtype).eps * torch.cat(exacts).norm()
    assert torch.cat(errors).norm() <= 2 * torch.cat(plain_errors).norm() + rounding
