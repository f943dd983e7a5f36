"""MoDeGPT: MLPs of fewer channels, sizes as planned, and degenerate inputs."""

from fractions import Fraction

import pytest
import torch
from grams import normal
from hypothesis import given
from hypothesis import strategies as st
from modegpt_blocks import (
    ATTENTION,
    DOWN,
    GATE,
    HIDDEN,
    MLP,
    TOKENS,
    UP,
    WIDTH,
    K,
    O,
    Q,
    V,
    block_of,
    gated,
    layer_of,
    norms,
    shifting,
    sized,
    variants,
)
from torch.nn.functional import silu

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.factors.reduced import ReducedFactors
from offline_compress.methods.block import Block
from offline_compress.methods.modegpt import ModeGpt
from offline_compress.methods.modegpt_mlp import leverage, reduce_mlp, refitted
from vllm_svd.format import Reduced


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
