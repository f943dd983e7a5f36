"""What is timed: models' attention geometries, and one step over their caches, decode or prompt."""

from dataclasses import dataclass

import torch

from vllm_svd.format import Tier
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.paged_batch import PagedBatch, Rope

BLOCK = 128


@dataclass(frozen=True)
class Geometry:
    """Heads of one attention layer: `group` query heads read each KV head of `head_dim`."""

    kv_heads: int
    group: int
    head_dim: int


GEOMETRIES = {
    "llama-3.1-8b": Geometry(8, 4, 128),
    "qwen3-0.6b": Geometry(8, 2, 128),
    "wiki-llama-s": Geometry(2, 2, 64),
}


@dataclass(frozen=True)
class Variant:
    """A latent cache: mode, KV heads that share a latent, and rank or tiers of keys and values."""

    name: str
    mode: str
    shared: int
    kept: float
    tiers: tuple[tuple[float, str], ...] = ()

    def layout(self, geometry: Geometry) -> LatentLayout:
        """`kept` and the shares of tiers are of the channels of a group, in multiples of 16."""
        channels = self.shared * geometry.head_dim
        if not self.tiers:
            rank = int(self.kept * channels)
            return LatentLayout(rank, rank)
        tiers = tuple(
            Tier.model_validate({"channels": max(16, int(share * channels) // 16 * 16), "store": s})
            for share, s in self.tiers
        )
        rank = sum(tier.channels for tier in tiers)
        return LatentLayout(rank, rank, tiers, tiers)


VARIANTS = (
    Variant("post 0.5", "post", 1, 0.5),
    Variant("post 0.5 int4", "post", 1, 0.5, ((0.5, "int4"),)),
    Variant("pre 0.5", "pre", 1, 0.5),
    Variant("pre 0.5 int4", "pre", 1, 0.5, ((0.5, "int4"),)),
    Variant("pre tiers", "pre", 1, 0.375, ((0.125, "int8"), (0.25, "int4"))),
    Variant("pre 0.25 of 2 heads", "pre", 2, 0.25),
    Variant("pre tiers of 2 heads", "pre", 2, 0.25, ((0.0625, "int8"), (0.1875, "int4"))),
)


@dataclass(frozen=True)
class Step:
    """One step of `batch` requests that have `context` tokens each, in shuffled pages.

    The last `queries` tokens of each are the step's: 1 decodes, all of them are a prompt.
    """

    geometry: Geometry
    batch: int
    context: int
    queries: int
    dtype: torch.dtype
    device: torch.device

    @property
    def pages(self) -> torch.Tensor:
        """[batch, blocks] int32."""
        generator = torch.Generator().manual_seed(0)
        blocks = -(-self.context // BLOCK)
        order = torch.randperm(self.batch * blocks, generator=generator)
        return order.view(self.batch, blocks).to(self.device, torch.int32)

    @property
    def rows(self) -> int:
        """Query tokens of all requests."""
        return self.batch * self.queries

    @property
    def pairs(self) -> int:
        """Query tokens and tokens that they see."""
        before = self.context - self.queries
        return self.batch * self.queries * (2 * before + self.queries + 1) // 2

    def paged(self) -> PagedBatch:
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * self.queries
        lengths = torch.full((self.batch,), self.context, dtype=torch.int32, device=self.device)
        return PagedBatch(starts, lengths, self.pages, self.rows, self.queries)

    def random(self, *shape: int) -> torch.Tensor:
        """Normally distributed, of the step's dtype."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def rope(self) -> Rope:
        """A table of 10,000 to the usual powers."""
        size = self.geometry.head_dim
        rates = 10000 ** (torch.arange(0, size, 2) / size)
        angles = torch.arange(self.context)[:, None] / rates
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return Rope(table.to(self.device, self.dtype), True)

    def dense_bytes(self) -> int:
        """Of keys and values that a step has to read."""
        g = self.geometry
        return 2 * self.batch * self.context * g.kv_heads * g.head_dim * self.dtype.itemsize

    def dense_operations(self) -> int:
        """Of Q K^T and the mixture of values."""
        g = self.geometry
        return 2 * 2 * self.pairs * g.kv_heads * g.group * g.head_dim
