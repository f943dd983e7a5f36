"""MoDeGPT: attention of fewer pairs and value directions is the dense one without the others."""

from itertools import combinations

import pytest
import torch
from grams import normal
from modegpt_blocks import (
    HEADS,
    HIDDEN,
    MLP,
    READERS,
    SIZE,
    K,
    O,
    Q,
    V,
    block_of,
    dense,
    layer_of,
    normed,
    norms,
    shifting,
    sized,
    variants,
)
from torch.nn.functional import softmax

from offline_compress.methods.modegpt import ModeGpt
from offline_compress.methods.modegpt_attention import strongest, value_output
from vllm_svd.format import KVProjection


def rotated(x, channels=None):
    """RoPE of [tokens, heads, d] at positions 0, 1, ...; of the given channels of d alone."""
    half = x.shape[-1] // 2
    pairs = torch.arange(half) if channels is None else channels[:half]
    angles = torch.arange(len(x))[:, None] * 100.0 ** -(pairs.double() / (SIZE // 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(query, key, value, layer):
    """Causal attention [tokens, heads, *] of rotated queries and keys, the scale that of d."""
    read = torch.arange(READERS) // (READERS // HEADS)
    scores = torch.einsum("qhd,khd->hqk", query, key[:, read]) * layer.head_dim**-0.5
    causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    weights = softmax(scores.masked_fill(~causal, -torch.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, value[:, read])


def served(block, found, x):
    """The reduced attention layer as a server runs it, through its cache."""

    def linear(path, x):
        if path not in found.matrices:
            return dense(block, path, x)
        y = found.matrices[path].factors.apply(x)
        return y if block.biases[path] is None else y + block.biases[path]

    bases, layer = found.bases, block.layer
    query, key = (rotated(normed(linear(path, x), layer)) for path in (Q, K))
    value = linear(V, x).unflatten(-1, (HEADS, SIZE))
    query = torch.einsum("tkgd,kdr->tkgr", query.unflatten(1, (HEADS, -1)), bases.k_up).flatten(
        1, 2
    )
    key = torch.einsum("tkd,krd->tkr", key, bases.k_down)
    value = torch.einsum("tkd,krd->tkr", value, bases.v_down)
    output = attend(query, key, value, layer).unflatten(1, (HEADS, -1))
    return linear(O, torch.einsum("tkgr,kdr->tkgd", output, bases.v_up).flatten(1))


@variants
@norms
def test_modules_of_full_size_compute_what_they_did(biased, qk_norm):
    layer, x = layer_of(qk_norm), shifting()
    block = block_of(layer, x, biased)
    found = ModeGpt().compress(block, sized(layer, SIZE))
    query, key = (rotated(normed(dense(block, path, x), layer)) for path in (Q, K))
    value = dense(block, V, x).unflatten(-1, (HEADS, SIZE))
    output = dense(block, O, attend(query, key, value, layer).flatten(1))
    torch.testing.assert_close(served(block, found, x), output, rtol=1e-11, atol=1e-11)
    for path in MLP:
        assert torch.equal(found.matrices[path].factors.dense(), block.weights[path])
    assert all(abs(made.loss) < 1e-14 for made in found.matrices.values())


@variants
@norms
def test_the_served_attention_is_the_dense_one_without_the_dropped_pairs_and_value_directions(
    biased, qk_norm
):
    """Brute force in all d channels: zeros in rotated keys, a projection of every value, and its
    bias passed through whole."""
    layer, x, rank = layer_of(qk_norm), shifting(), 4
    block = block_of(layer, x, biased)
    found = ModeGpt().compress(block, sized(layer, rank))
    channels, _ = strongest(block, rank)
    mask = torch.zeros(HEADS, SIZE, dtype=torch.float64).scatter(1, channels, 1)
    query, key = (rotated(normed(dense(block, path, x), layer)) for path in (Q, K))
    down, up = bases_of(block, found.matrices, rank)
    value = torch.einsum(
        "tke,kre,kdr->tkd", (x @ block.weights[V].T).view(-1, HEADS, SIZE), down, up
    )
    expected = attend(query, key * mask, value, layer).flatten(1) @ block.weights[O].T
    if biased:
        bias = block.biases[V].view(HEADS, 1, SIZE).expand(HEADS, READERS // HEADS, SIZE)
        expected = expected + block.weights[O] @ bias.flatten() + block.biases[O]
    torch.testing.assert_close(served(block, found, x), expected, rtol=1e-10, atol=1e-10)


def bases_of(block, matrices, rank):
    """down [heads, r, d] of R = down W_v and up [heads, d, r] of O' = O up, solved for."""
    values = matrices[V].factors.reduced.view(HEADS, rank, HIDDEN)
    of_head = block.weights[V].view(HEADS, SIZE, HIDDEN)
    down = torch.linalg.lstsq(of_head.mT, values.mT).solution.mT
    outputs = block.weights[O].view(HIDDEN, HEADS, -1, SIZE).permute(1, 0, 2, 3).flatten(1, 2)
    reads = matrices[O].factors.reduced.view(HIDDEN, HEADS, -1, rank).permute(1, 0, 2, 3)
    return down, torch.linalg.lstsq(outputs, reads.flatten(1, 2)).solution


def test_dropped_outputs_are_zero_even_under_a_bias():
    block = block_of(layer_of(), shifting(), biased=True)
    found = ModeGpt().compress(block, sized(block.layer, 4)).matrices
    for path in (Q, K):
        factors = found[path].factors
        y = factors.apply(shifting()) + block.biases[path]
        kept = torch.zeros(y.shape[1], dtype=torch.bool).index_fill(0, factors.rows.long(), True)
        assert not y[:, ~kept].any()
        assert torch.equal(factors.correction[kept], torch.zeros(int(kept.sum())).double())


def test_rope_commutes_with_the_choice_of_pairs():
    block = block_of(layer_of(), shifting())
    keys = dense(block, K, shifting()).unflatten(-1, (HEADS, SIZE))
    channels, _ = strongest(block, 4)
    for head, kept in enumerate(channels):
        one = keys[:, head : head + 1]
        assert torch.equal(rotated(one[..., kept], kept), rotated(one)[..., kept])


def test_the_pairs_that_stay_carry_the_most_energy_of_all_choices():
    block = block_of(layer_of(), shifting())
    channels, loss = strongest(block, 4)
    half, group = SIZE // 2, READERS // HEADS
    query = sum(block.query_energy.unflatten(0, (HEADS, group)).unbind(1))
    energy = (query[:, :half] + query[:, half:]) * (
        block.key_energy[:, :half] + block.key_energy[:, half:]
    )
    best = torch.stack([energy[:, pair].sum(1) for pair in combinations(range(half), 2)]).amax(0)
    kept = energy.gather(1, channels[:, :2])
    torch.testing.assert_close(kept.sum(1), best)
    assert torch.equal(channels[:, 2:], channels[:, :2] + half)
    assert (channels.diff(dim=1) > 0).all()
    assert loss == pytest.approx(float(1 - best.sum() / energy.sum()), rel=1e-12)


def published(block, rank):
    """W_v' and O' of the paper: U of C^(1/2) W_v^T, then the SVD of Sigma V^T O^T, per KV head."""
    values, vectors = torch.linalg.eigh(block.statistics[V].gram)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    products = []
    for head in range(HEADS):
        of_head = block.weights[V][head * SIZE : (head + 1) * SIZE].T
        group = READERS // HEADS * SIZE
        reads = block.weights[O][:, head * group : (head + 1) * group]
        stacked = torch.cat([part.T for part in reads.split(SIZE, 1)], 1)
        u, s, vh = torch.linalg.svd(root @ of_head, full_matrices=False)
        u2, s2, v2h = torch.linalg.svd(s[:, None] * vh @ stacked, full_matrices=False)
        products.append(inverse @ u @ u2[:, :rank] @ (s2[:rank, None] * v2h[:rank]))
    return torch.stack(products)  # [heads, hidden, group * hidden]


def products_of(found, rank):
    """(O_g up) (down W_v), laid out like the published ones."""
    values = found[V].factors.reduced.unflatten(0, (HEADS, rank))
    reads = found[O].factors.reduced.unflatten(1, (HEADS, READERS // HEADS, rank))
    return torch.einsum("krn,mkgr->kngm", values, reads).flatten(2)


def test_values_and_outputs_are_the_published_joint_svd():
    block, rank = block_of(layer_of(), shifting()), 3
    made = products_of(value_output(block, V, O, rank), rank)
    torch.testing.assert_close(made, published(block, rank), rtol=1e-7, atol=1e-8)


def test_no_other_basis_of_values_loses_less():
    block, rank = block_of(layer_of(), shifting()), 3
    found = value_output(block, V, O, rank)
    gram, full = block.statistics[V].gram, products_of(value_output(block, V, O, SIZE), SIZE)

    def lost(products):
        error = full - products
        return float(torch.einsum("kna,nm,kma->", error, gram, error))

    best = products_of(found, rank)
    total = float(torch.einsum("kna,nm,kma->", full, gram, full))
    assert found[V].loss == found[O].loss == pytest.approx(lost(best) / total, rel=1e-9)
    of_head = block.weights[V].view(HEADS, SIZE, HIDDEN)
    down, _ = bases_of(block, found, rank)
    for seed in range(40):
        noise = normal(HEADS, rank, SIZE, seed=seed)
        for basis in (noise, down + 0.02 * noise):
            q, _ = torch.linalg.qr(basis.mT)
            latents = q.mT @ of_head
            # The best outputs for these latents, by least squares on the Gram.
            inner = latents @ gram @ latents.mT
            reads = torch.linalg.solve(inner, latents @ gram @ full)
            assert lost(latents.mT @ reads) > lost(best)


def test_the_cache_is_one_that_selects():
    block = block_of(layer_of(), shifting())
    bases = ModeGpt().compress(block, sized(block.layer, 4)).bases
    assert bases.config == KVProjection(
        mode="post", num_kv_heads=HEADS, head_dim=SIZE, k_rank=4, v_rank=4
    )
    for down, up in ((bases.k_down, bases.k_up), (bases.v_down, bases.v_up)):
        assert torch.equal(down.mT, up)
        assert torch.equal(down @ up, torch.eye(4).double().expand(HEADS, 4, 4))
        assert set(down.unique().tolist()) == {0.0, 1.0}
