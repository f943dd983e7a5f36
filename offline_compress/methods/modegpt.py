"""MoDeGPT: Lin et al., "Modular Decomposition for LLM Compression", ICLR 2025, arXiv 2408.09632.

Modules are reduced, not matrices: of each W [m, n] of a module a dense submatrix is left, some of
its rows or of its columns.
    gate, up, down: k of the channels between them, by Nystroem (modegpt_mlp)
    q, k:           r/2 of the d/2 rotated pairs of every KV head, by CR (modegpt_attention)
    v, o:           r of the d channels of every KV head, by SVD (modegpt_attention)
Attention runs in r channels a head, and so does its cache: bases after RoPE that only select.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import lcm
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from offline_compress.calibration.statistics import Needs
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.method import Compressed, Factorization, Method
from offline_compress.methods.modegpt_attention import projection, reduce_attention
from offline_compress.methods.modegpt_mlp import reduce_mlp
from offline_compress.methods.modegpt_modules import attention_of, mlps_of
from vllm_svd.format import KVProjection, Module


class ModeGpt(Method):
    """Weights, their products and the K/V cache shrink, and no product is added.

    `ridge` of the leverage scores is relative to the mean energy of a channel, `refit_ridge` to
    that of each channel kept. Heads keep a multiple of `rank_multiple` channels, even for the sake
    of pairs, and as many of K as of V: vLLM's own kernels serve no other cache. MLPs keep a
    multiple of the recipe's. With qk-norm the weights of queries and keys stay dense.
    """

    paper: ClassVar[str] = "Lin et al., ICLR 2025, arXiv 2408.09632"
    when: ClassVar[str] = "weights and K/V cache shrink together, in dense matrices"
    artefact: ClassVar[str] = "smaller dense matrices, and a smaller K/V cache"
    allocator: ClassVar[str] = "block_influence"
    reads_attention: ClassVar[bool] = True
    separable: ClassVar[bool] = False

    name: Literal["modegpt"] = "modegpt"
    # Half of every MLP of wiki-llama-s: perplexity 45.6, and 46.2 at 0.01 (dense 42.4).
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    # The same from 2 tokens a channel: 51.5, and 52.3 at 1e-6; from 48 it makes no difference.
    refit_ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    rank_multiple: PositiveInt = 8

    @property
    def needs(self) -> Needs:
        return frozenset({"gram"})

    def modules_at(
        self, layer: Layer, shares: Mapping[str, Fraction], multiple: int = 1
    ) -> dict[str, Module | str]:
        """Within the shares of the layer as a whole: few sizes of heads can be served.

        They keep the nearest, and MLPs what is left of the bytes.
        """
        found: dict[str, Module | str] = dict.fromkeys(shares, "neither attention nor a gated MLP")
        spare = Fraction(0)
        if attention := attention_of(layer):
            rank = self._rank(layer, shares)
            found |= attention.at(rank, shares)
            if layer.qk_norm and isinstance(rank, int):
                reason = "qk-norm reads every channel; only the cache shrinks"
                found |= dict.fromkeys(attention.paths[:2], reason)
            spare = attention.budget(shares) - attention.bytes(found)
        mlps = mlps_of(layer)
        shrinking = sum(mlp.dense for mlp in mlps if not mlp.whole(shares))
        for mlp in mlps:
            size: int | str = mlp.whole(shares)
            if not size:
                budget = mlp.budget(shares) + spare * mlp.dense / shrinking
                size = mlp.within(budget, multiple)
            found |= mlp.at(size, shares)
        return found

    def projection_at(self, layer: Layer, shares: Mapping[str, Fraction]) -> KVProjection | None:
        rank = self._rank(layer, shares)
        return None if isinstance(rank, str) else projection(layer, rank)

    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        layer = block.layer
        found: dict[str, Factorization] = {}
        for mlp in mlps_of(layer):
            gate, up, down = mlp.paths
            if down in wanted:
                kept = mlp.size(wanted)
                found |= reduce_mlp(block, gate, up, down, kept, self.ridge, self.refit_ridge)
        attention = attention_of(layer)
        if attention is None or attention.paths[2] not in wanted:
            return Compressed(found)
        query, key, value, output = attention.paths
        rank = attention.size(wanted)
        matrices, bases = reduce_attention(block, query, key, value, output, rank)
        return Compressed(found | matrices, bases)

    def _rank(self, layer: Layer, shares: Mapping[str, Fraction]) -> int | str:
        """Channels that every head keeps, or why all."""
        attention = attention_of(layer)
        if attention is None:
            return "queries, keys, values and outputs are not one matrix each"
        if whole := attention.whole(shares):
            return whole
        least = lcm(2, self.rank_multiple)
        if all(mlp.whole(shares) for mlp in mlps_of(layer)):
            return attention.within(attention.budget(shares), least)
        share = min(shares[path] for path in attention.paths)
        return attention.smaller(least * max(1, round(share * attention.channels / least)))
