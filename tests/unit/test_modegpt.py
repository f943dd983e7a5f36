"""MoDeGPT: what is left of a module computes what its three formulas say, and nothing else."""

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu, softmax

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.factors.reduced import ReducedFactors
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.modegpt import ModeGpt
from offline_compress.methods.modegpt_attention import strongest, value_output
from offline_compress.methods.modegpt_mlp import leverage, reduce_mlp, refitted
from vllm_svd.format import KVProjection, Reduced

HIDDEN, READERS, HEADS, SIZE, WIDTH, TOKENS = 24, 6, 2, 8, 20, 90
Q, K, V, O = (f"l.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"l.mlp.{name}_proj" for name in ("gate", "up", "down"))
ATTENTION, MLP = (Q, K, V, O), (GATE, UP, DOWN)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(qk_norm=False, hidden=HIDDEN, width=WIDTH, size=SIZE, item_bytes=2, experts=0):
    shapes = {
        Q: (READERS * size, hidden),
        K: (HEADS * size, hidden),
        V: (HEADS * size, hidden),
        O: (hidden, READERS * size),
    }
    for mlp in [f"l.mlp.experts.{index}" for index in range(experts)] or ["l.mlp"]:
        shapes |= {f"{mlp}.{name}_proj": (width, hidden) for name in ("gate", "up")}
        shapes |= {f"{mlp}.down_proj": (hidden, width)}
    return Layer("l", shapes, READERS, HEADS, size, item_bytes, qk_norm)


def normed(x, layer):
    """RMS norm of every head, as qk-norm does before RoPE."""
    heads = x.unflatten(-1, (-1, layer.head_dim))
    return heads / heads.square().mean(-1, keepdim=True).sqrt() if layer.qk_norm else heads


def rotated(x, channels=None):
    """RoPE of [tokens, heads, d] at positions 0, 1, ...; of the given channels of d alone."""
    half = x.shape[-1] // 2
    pairs = torch.arange(half) if channels is None else channels[:half]
    angles = torch.arange(len(x))[:, None] * 100.0 ** -(pairs.double() / (SIZE // 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def block_of(layer, x, biased=False, scale=1.0, dtype=torch.float64):
    """Random weights, and the statistics of the inputs x [tokens, hidden]."""
    weights = {
        path: (scale * normal(*shape, seed=seed + 1)).to(dtype)
        for seed, (path, shape) in enumerate(layer.shapes.items())
    }
    biases = {
        path: normal(shape[0], seed=70 + seed) if biased else None
        for seed, (path, shape) in enumerate(layer.shapes.items())
    }
    block = Block(layer, weights, biases, {})
    gram = x.T @ x / len(x)
    seen = {path: LayerStatistics(gram) for path in layer.shapes}
    for path in layer.shapes:
        if path.endswith("down_proj"):
            z = gated(block, x, path.removesuffix("down_proj"))
            seen[path] = LayerStatistics(z.T @ z / len(z))
    energies = [normed(dense(block, path, x), layer).square().mean(0) for path in (Q, K)]
    return Block(layer, weights, biases, seen, None, *energies)


def dense(block, path, x):
    return torch.nn.functional.linear(x, block.weights[path].double(), block.biases[path])


def gated(block, x, mlp="l.mlp."):
    return silu(dense(block, f"{mlp}gate_proj", x)) * dense(block, f"{mlp}up_proj", x)


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


def sized(layer, rank, kept=WIDTH):
    """The artefacts of these sizes, of the full ones too."""
    found = {}
    for path, (rows, columns) in layer.shapes.items():
        heads = {Q: READERS, K: HEADS, V: HEADS, O: READERS}.get(path)
        lines = kept if heads is None else heads * rank
        by_columns = path in (O, DOWN)
        found[path] = Reduced(
            out_features=rows,
            in_features=columns,
            kept_out=rows if by_columns else lines,
            kept_in=lines if by_columns else columns,
        )
    if layer.qk_norm:
        del found[Q], found[K]
    return found


def shifting(tokens=TOKENS, width=HIDDEN, seed=40):
    """Inputs of a decaying, rotated spectrum and of a mean that is not zero."""
    rotation, _ = torch.linalg.qr(normal(width, width, seed=seed))
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    return normal(tokens, width, seed=seed + 1) * spectrum @ rotation + normal(width, seed=seed + 2)


variants = pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
norms = pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])


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


def test_leverage_is_its_definition():
    z = shifting(width=WIDTH)
    gram = z.T @ z / TOKENS
    values, vectors = torch.linalg.eigh(gram)
    shrunk = values / (values + 0.1 * gram.diagonal().mean())
    torch.testing.assert_close(leverage(gram, 0.1), (vectors.square() * shrunk).sum(1))


@pytest.mark.parametrize("kept", [1, 7, WIDTH])
def test_the_refit_is_least_squares(kept):
    z, weight = shifting(width=WIDTH), normal(HIDDEN, WIDTH)
    channels = (
        torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))[:kept].sort().values
    )
    made, _ = refitted(weight, z.T @ z / TOKENS, channels, 0)
    fitted = torch.linalg.lstsq(z[:, channels], z @ weight.T).solution.T
    torch.testing.assert_close(made, fitted, rtol=1e-8, atol=1e-8)


@variants
def test_the_loss_of_an_mlp_is_that_of_its_output(biased):
    x = shifting()
    block = block_of(layer_of(), x, biased)
    found = reduce_mlp(block, GATE, UP, DOWN, 9, 0.1, 0.01)
    gate, up = (
        found[path].factors.apply(x) + (block.biases[path] if biased else 0) for path in (GATE, UP)
    )
    exact = gated(block, x) @ block.weights[DOWN].T
    lost = exact - found[DOWN].factors.apply(silu(gate) * up)
    relative = float(lost.square().sum() / exact.square().sum())
    assert all(made.loss == pytest.approx(relative, rel=1e-9) for made in found.values())
    assert torch.equal(found[GATE].factors.rows, found[DOWN].factors.columns)
    assert found[DOWN].damping == pytest.approx(0.01, rel=1e-6)


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


shares = st.fractions(Fraction(1, 50), 1, max_denominator=97)


@given(
    share=shares,
    multiple=st.sampled_from([1, 8, 64]),
    heads=st.sampled_from([1, 2, 8, 16]),
    size=st.sampled_from([8, 64, 128]),
    width=st.integers(1, 400),
    qk_norm=st.booleans(),
    item_bytes=st.sampled_from([2, 4]),
)
def test_a_layer_uses_up_its_shares_and_its_plans_agree(
    share, multiple, heads, size, width, qk_norm, item_bytes
):
    layer = layer_of(qk_norm, 96, width, size, item_bytes, experts=2)
    method = ModeGpt(rank_multiple=heads)
    given_shares = dict.fromkeys(layer.shapes, share)
    planned = method.modules_at(layer, given_shares, multiple)
    assert planned.keys() == layer.shapes.keys()

    cache = method.projection_at(layer, given_shares)
    step = max(2, heads)
    for path in ATTENTION:
        if cache is None or (qk_norm and path in (Q, K)):
            assert isinstance(planned[path], str)
        else:
            assert planned[path] == sized(layer, cache.k_rank, 1)[path]
    if cache:
        assert cache.k_rank == cache.v_rank
        assert cache.k_rank % step == 0
        assert abs(cache.k_rank - share * size) <= Fraction(step, 2) or cache.k_rank == step

    widths = set()
    for mlp in ("l.mlp.experts.0", "l.mlp.experts.1"):
        gate, up, down = (planned[f"{mlp}.{name}_proj"] for name in ("gate", "up", "down"))
        if isinstance(down, str):
            assert {gate, up} == {down}
            widths.add(width)
        else:
            assert (
                gate
                == up
                == down.model_copy(
                    update={
                        "out_features": width,
                        "in_features": 96,
                        "kept_out": down.kept_in,
                        "kept_in": 96,
                    }
                )
            )
            widths.add(down.kept_in)
    (kept,) = widths
    assert kept == width or kept % multiple == 0

    used = sum(
        layer.dense_bytes(path) if isinstance(made, str) else made.bytes(item_bytes)
        for path, made in planned.items()
    )
    rest = share * sum(map(layer.dense_bytes, layer.shapes)) - used
    assert rest >= 0 or kept in (multiple, width)
    if kept < width:
        assert rest < 2 * multiple * 3 * (96 * item_bytes + 4)
    for path, made in planned.items():
        assert isinstance(made, str) or made.bytes(item_bytes) < layer.dense_bytes(path)


def test_without_an_mlp_that_shrinks_heads_stay_within_their_shares():
    layer = layer_of(size=64, hidden=96)
    asked = dict.fromkeys(ATTENTION, Fraction(6, 10))
    planned = ModeGpt().modules_at(layer, asked)
    assert planned.keys() == asked.keys()
    assert planned == {path: sized(layer, 32)[path] for path in ATTENTION}
    nearest = ModeGpt().modules_at(layer, dict.fromkeys(layer.shapes, Fraction(6, 10)))
    assert nearest[V] == sized(layer, 40)[V]


@pytest.mark.parametrize("dense_path", [Q, K, V, O, GATE, UP, DOWN])
@pytest.mark.parametrize("share", [None, Fraction(1)])
def test_a_module_of_which_one_matrix_stays_dense_stays_dense(dense_path, share):
    layer, method = layer_of(), ModeGpt(rank_multiple=2)
    asked = dict.fromkeys(layer.shapes, Fraction(1, 2))
    if share is None:
        del asked[dense_path]
    else:
        asked[dense_path] = share
    planned = method.modules_at(layer, asked)
    module, other = (ATTENTION, MLP) if dense_path in ATTENTION else (MLP, ATTENTION)
    assert all(dense_path in planned[path] for path in module if path in asked)
    assert all(isinstance(planned[path], Reduced) for path in other)
    assert (method.projection_at(layer, asked) is None) == (dense_path in ATTENTION)


@norms
@variants
def test_compress_makes_what_was_planned(qk_norm, biased):
    layer, method = layer_of(qk_norm), ModeGpt(rank_multiple=2)
    asked = dict.fromkeys(layer.shapes, Fraction(3, 5))
    planned = method.modules_at(layer, asked)
    wanted = {path: made for path, made in planned.items() if isinstance(made, Reduced)}
    found = method.compress(block_of(layer, shifting(), biased), wanted)
    assert found.bases.config == method.projection_at(layer, asked)
    made = {path: done.factors.config() for path, done in found.matrices.items()}
    # A bias is not known before the weights are: its correction comes on top.
    assert {path: c.model_copy(update={"correction": False}) for path, c in made.items()} == wanted
    corrected = {path for path, config in made.items() if config.correction}
    assert corrected == ({Q, K, O} & wanted.keys() if biased else set())
    for name, stored in found.bases.config.tensors("l").items():
        assert found.bases.tensors("l")[name].shape == stored.shape


@pytest.mark.parametrize("experts", [1, 3])
def test_each_expert_keeps_channels_of_its_own(experts):
    layer = layer_of(experts=experts)
    block = block_of(layer, shifting())
    never = block.statistics | {"l.mlp.experts.0.down_proj": LayerStatistics(torch.zeros(20, 20))}
    wanted = {path: made for path, made in sized(layer, 4).items() if "experts" in path}
    wanted = {
        path: made.model_copy(update={"kept_in" if "down" in path else "kept_out": 6})
        for path, made in wanted.items()
    }
    block = Block(layer, block.weights, block.biases, never)
    found = ModeGpt().compress(block, wanted)
    assert found.matrices.keys() == wanted.keys()
    assert found.bases is None
    norms_of = block.weights["l.mlp.experts.0.down_proj"].square().sum(0)
    kept = found.matrices["l.mlp.experts.0.gate_proj"].factors.rows.long()
    assert torch.equal(kept, norms_of.topk(6).indices.sort().values)
    refit = found.matrices["l.mlp.experts.0.down_proj"].factors.reduced
    assert torch.equal(refit, block.weights["l.mlp.experts.0.down_proj"][:, kept])


def hostile(kind):
    x = shifting()
    match kind:
        case "few tokens":
            return x[:5]
        case "one token":
            return x[:1]
        case "dead channels":
            x[:, ::3] = 0
        case "constant":
            return x[:1].expand(TOKENS, -1)
        case "outliers":
            x[:, 1] *= 1000
            x[0] *= 1000
        case "huge":
            return x * 1e70
        case "tiny":
            return x * 1e-70
        case "all dead":
            return x * 0
    return x


KINDS = ["few tokens", "one token", "dead channels", "constant", "outliers", "huge", "tiny"]


@pytest.mark.parametrize("kind", [*KINDS, "all dead", "zero weight", "bf16 with zeros"])
def test_degenerate_inputs_give_finite_artefacts_and_losses(kind):
    layer, x = layer_of(), hostile(kind)
    zero, half = kind == "zero weight", kind == "bf16 with zeros"
    dtype = torch.bfloat16 if half else torch.float64
    block = block_of(layer, x, scale=0.0 if zero else 1.0, dtype=dtype)
    if half:
        for weight in block.weights.values():
            weight[::2] = 0
    for refit_ridge in (0.0, 0.01):
        found = ModeGpt(refit_ridge=refit_ridge).compress(block, sized(layer, 4, 7))
        for made in found.matrices.values():
            assert made.factors.dense().isfinite().all()
            assert -1e-14 < made.loss <= 1
            assert 0 <= made.damping <= refit_ridge + 0.02
    if zero:
        assert not any(made.loss for made in found.matrices.values())


def test_one_channel_of_outliers_does_not_drown_the_refit_of_the_others():
    z, weight = shifting(width=WIDTH), normal(HIDDEN, WIDTH)
    kept = torch.arange(0, WIDTH, 2)

    def error(z):
        made, _ = refitted(weight, z.T @ z / TOKENS, kept, 0.01)
        return (z @ weight.T - z[:, kept] @ made.T).square().sum()

    scaled = torch.ones(WIDTH, dtype=torch.float64).index_fill(0, kept[:1], 1000)
    weight[:, 0] = 0
    torch.testing.assert_close(error(z * scaled), error(z), rtol=1e-6, atol=0)


def test_it_reads_the_gram_and_the_energies_it_asks_for():
    assert ModeGpt().needs == frozenset({"gram"})
    assert ModeGpt.reads_attention
    block = block_of(layer_of(), shifting())
    blind = Block(block.layer, block.weights, block.biases, block.statistics)
    with pytest.raises(LookupError, match="energies"):
        ModeGpt().compress(blind, sized(block.layer, 4))
    unseen = dict.fromkeys(block.layer.shapes, LayerStatistics())
    with pytest.raises(LookupError, match="gathered no gram"):
        ModeGpt().compress(
            Block(block.layer, block.weights, block.biases, unseen), sized(block.layer, 4)
        )


@pytest.mark.parametrize("axes", ["rows", "columns", "both", "neither"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_reduced_matrix_multiplies_as_its_dense_form_and_survives_storage(axes, corrected):
    rows = torch.tensor([0, 3, 4]) if axes in ("rows", "both") else torch.arange(6)
    columns = torch.tensor([1, 2, 5, 8]) if axes in ("columns", "both") else torch.arange(9)
    weight, x = normal(len(rows), len(columns)), normal(2, 5, 9, seed=1)
    correction = normal(6, seed=2) if corrected else None
    made = ReducedFactors.of(weight, (6, 9), rows=rows, columns=columns, correction=correction)
    full = torch.zeros(6, 9, dtype=torch.float64)
    full[rows[:, None], columns] = weight
    assert torch.equal(made.dense(), full)
    expected = x @ full.T + (correction if corrected else 0)
    torch.testing.assert_close(made.apply(x), expected, rtol=1e-13, atol=1e-13)
    stored = made.to(torch.bfloat16)
    described = stored.config().tensors("p")
    assert {name: tensor.shape for name, tensor in stored.tensors("p").items()} == {
        name: part.shape for name, part in described.items()
    }
    for name, tensor in stored.tensors("p").items():
        assert tensor.dtype == (torch.int32 if described[name].dtype else torch.bfloat16)
    back = ReducedFactors.of_parts(stored.config(), stored.parts())
    assert torch.equal(back.dense(), full.bfloat16().double())
    assert stored.to(torch.float32).config() == made.config()


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
