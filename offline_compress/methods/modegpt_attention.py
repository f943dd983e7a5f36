"""Attention in MoDeGPT: pairs of query and key channels by CR, values and outputs by joint SVD.

d is the head size, r the channels that a head keeps.

Queries and keys: RoPE turns the channels i and i + d/2, a pair, into each other, so it commutes
with a choice of whole pairs. Of every KV head the r/2 of the largest sqrt(Q K) stay, with K the
energy E[x_i^2 + x_(i+d/2)^2] of the pair in keys and Q that in queries, as RoPE receives them,
summed over the query heads that read the KV head. The rows of the others go.

Values and outputs: of every KV head, the projection up [d, r] down [r, d] of its value v that costs
the outputs O_g [m, d] least: min sum_g E||O_g (I - up down) v||^2. This is the joint SVD of the
paper, of C^(1/2) W_v^T and the stacked O_g^T, without a root of C [n, n] or its inverse. W_v
becomes down W_v and O_g becomes O_g up; down has orthonormal rows, which keeps the scale of v.

Attention weights sum to 1, so that a value bias b adds O b to every output: o's correction does.
"""

import torch

from offline_compress.factors.reduced import ReducedFactors
from offline_compress.kv.basis import solve, weighted_error
from offline_compress.kv.projection import KVBases
from offline_compress.linalg import eigh
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.method import Factorization
from vllm_svd.format import KVProjection

Matrices = dict[str, Factorization]


def reduce_attention(
    block: Block, query: str, key: str, value: str, output: str, rank: int
) -> tuple[Matrices, KVBases]:
    """The matrices of an attention layer with `rank` channels a head, and the bases of its cache.

    With qk-norm, which reads every channel, those of queries and keys are left out.
    """
    layer = block.layer
    channels, loss = strongest(block, rank)
    matrices = value_output(block, value, output, rank)
    if not layer.qk_norm:
        read = channels.repeat_interleave(layer.query_heads // layer.kv_heads, 0)
        matrices[query] = Factorization(_selected(block, query, read), loss)
        matrices[key] = Factorization(_selected(block, key, channels), loss)
    return matrices, _bases(layer, channels)


def projection(layer: Layer, rank: int) -> KVProjection:
    """`rank` channels of every rotated key and of every value."""
    heads, size = layer.kv_heads, layer.head_dim
    return KVProjection(mode="post", num_kv_heads=heads, head_dim=size, k_rank=rank, v_rank=rank)


def strongest(block: Block, rank: int) -> tuple[torch.Tensor, float]:
    """The channels [kv_heads, rank] of the pairs that stay, ascending, and the part of Q K lost."""
    if block.query_energy is None or block.key_energy is None:
        raise LookupError("no energies of queries and keys: the method must say it reads_attention")
    query, key = _of_pairs(block.query_energy), _of_pairs(block.key_energy)
    query = query.view(len(key), -1, key.shape[1]).sum(1)
    scores = query.sqrt() * key.sqrt()
    pairs = scores.argsort(dim=1, descending=True, stable=True)[:, : rank // 2].sort(1).values
    channels = torch.cat([pairs, pairs + key.shape[1]], dim=1)
    largest = scores.max()
    if not largest > 0:
        return channels, 0.0
    energy = (scores / largest).square()
    return channels, float(energy.scatter(1, pairs, 0).sum() / energy.sum())


def value_output(block: Block, value: str, output: str, rank: int) -> Matrices:
    """Latents in the first `rank` channels of every value head, and outputs that read those.

    The loss of both is the dropped tail of the joint SVD.
    """
    layer = block.layer
    heads, readers, size = layer.kv_heads, layer.query_heads, layer.head_dim
    weight, read = block.weights[value].double(), block.weights[output].double()
    gram = block.statistics[value].gathered("gram").double()
    if not gram.trace() > 0:  # inputs never seen alive say nothing
        gram = torch.eye(len(gram)).to(gram)
    of_head, by_reader = weight.view(heads, size, -1), read.view(len(read), heads, -1, size)
    # Bases are made on the host, as those of other K/V projections.
    moments = ((weight @ gram).view_as(of_head) @ of_head.mT).cpu()
    metrics = torch.einsum("mhgd,mhge->hde", by_reader, by_reader).cpu()
    solved = [solve(m, _definite(c), rank) for m, c in zip(metrics, moments, strict=True)]
    up, down = (torch.stack(bases) for bases in zip(*solved, strict=True))
    loss = weighted_error(metrics, moments, up, down)

    first = torch.arange(rank).expand(readers, rank)
    rows, columns = _lines(first[:heads], size), _lines(first, size)
    values = (down.to(weight) @ of_head).flatten(0, 1)
    reads = torch.einsum("mhgd,hdr->mhgr", by_reader, up.to(read)).flatten(1)
    bias, correction = block.biases[value], None
    if bias is not None:
        seen = bias.double().view(heads, 1, size).expand(heads, readers // heads, size).flatten()
        correction = read @ seen - reads @ seen[columns]
    of_values = ReducedFactors.of(values, layer.shapes[value], rows=rows)
    of_outputs = ReducedFactors.of(
        reads, layer.shapes[output], columns=columns, correction=correction
    )
    return {value: Factorization(of_values, loss), output: Factorization(of_outputs, loss)}


def _of_pairs(energy: torch.Tensor) -> torch.Tensor:
    """[heads, d/2] of channels [heads, d], on the host."""
    first, second = energy.double().cpu().chunk(2, dim=1)
    return first + second


def _selected(block: Block, path: str, channels: torch.Tensor) -> ReducedFactors:
    """The rows of `channels` [heads, rank]; the bias of the others is cancelled."""
    weight, bias = block.weights[path].double(), block.biases[path]
    rows = _lines(channels, block.layer.head_dim).to(weight.device)
    correction = None if bias is None else (-bias.double()).index_fill(0, rows, 0)
    shape = block.layer.shapes[path]
    return ReducedFactors.of(weight[rows], shape, rows=rows, correction=correction)


def _lines(channels: torch.Tensor, size: int) -> torch.Tensor:
    """Rows or columns [heads * rank] of the channels [heads, rank] of heads of this size."""
    return (torch.arange(len(channels))[:, None] * size + channels).flatten()


def _definite(moment: torch.Tensor) -> torch.Tensor:
    """Without what rounding made negative, which is all there is of a value that cancels."""
    values, vectors = eigh(moment)
    return (vectors * values) @ vectors.mT


def _bases(layer: Layer, channels: torch.Tensor) -> KVBases:
    """Selections: of keys the channels that stay [kv_heads, rank], of values the first ones."""
    heads, rank = channels.shape
    identity = torch.eye(layer.head_dim, dtype=torch.float64)
    key, value = identity[channels], identity[:rank].repeat(heads, 1, 1)
    return KVBases(projection(layer, rank), key, key.mT, value, value.mT)
