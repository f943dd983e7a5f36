"""Dobi-SVD: the subspace of pooled outputs, and storage that counts real bytes."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.calibration import LayerStatistics
from offline_compress.factors import LowRankFactors, LowRankInt8Factors
from offline_compress.linalg import left_of_gram
from offline_compress.methods import Block, Layer
from offline_compress.methods.dobi_svd import DobiSvd, output_subspace, remapped, remapped_at
from offline_compress.methods.svd_llm import SvdLlm
from vllm_svd.format import LowRank, LowRankInt8

SHAPES = [(12, 20), (20, 12), (14, 14)]
BF16 = 2.0**-8  # half a unit in the last of 8 bits


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(rows, columns, tokens=200, seed=0):
    """W and statistics of inputs with a decaying, rotated spectrum."""
    weight = random(rows, columns, seed=seed)
    x = random(tokens, columns, seed=seed + 1) * 0.8 ** torch.arange(columns)
    x = x @ torch.linalg.qr(random(columns, columns, seed=seed + 2)).Q
    return weight, LayerStatistics(gram=x.T @ x / tokens, tokens=tokens)


def layer_of(rows, columns, item_bytes=2):
    return Layer("l", {"l.q_proj": (rows, columns)}, 1, 1, 1, item_bytes)


def rounding(right, left, made):
    """Entry by entry, how far left @ right moves with its factors as far as storage lets them."""
    moved = []
    for whole, scale, tail in (
        (right, made.A_scale, made.A_tail.shape[1]),
        (left.T, made.B_scale, len(made.B_tail)),
    ):
        bound = ((0.5 + 1e-4) * scale.double()[:, None]).repeat(1, whole.shape[1])
        exact = whole.shape[1] - tail
        bound[:, exact:] = whole[:, exact:].abs() * BF16
        moved.append(bound)
    a, b = moved[0], moved[1].T
    return b @ right.abs() + left.abs() @ a + b @ a


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_rebuilds_the_matrix_in_both_storages(shape):
    weight, statistics = case(*shape)
    rank = min(shape)
    plain = DobiSvd(remap=False).factorize(weight, statistics, rank)
    assert isinstance(plain.factors, LowRankFactors)
    A, B = plain.factors.A, plain.factors.B
    torch.testing.assert_close(plain.factors.dense(), weight, rtol=0, atol=1e-12)
    stored = (plain.factors.to(torch.bfloat16).dense() - weight).abs()
    assert (stored <= (2 * BF16 + BF16**2) * B.abs() @ A.abs() + 1e-12).all()

    made = DobiSvd().factorize(weight, statistics, rank).factors.to(torch.bfloat16)
    assert isinstance(made, LowRankInt8Factors)
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    A, B = (right, left * sigma) if shape[0] > shape[1] else (sigma[:, None] * right, left)
    assert ((made.dense() - weight).abs() <= rounding(A, B, made) + 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_longer_side_carries_sigma_and_its_surplus_stays_in_the_dtype_of_the_model(shape):
    rows, columns = shape
    weight, statistics = case(rows, columns)
    made = DobiSvd().factorize(weight, statistics, 5).factors
    assert made.A_tail.shape == (5, max(0, columns - rows))
    assert made.B_tail.shape == (max(0, rows - columns), 5)
    kept = DobiSvd(remap=False).factorize(weight, statistics, 5).factors.dense()
    sigma = torch.linalg.svdvals(kept)[:5]
    longer, shorter = (made.B.T, made.A) if rows > columns else (made.A, made.B.T)
    # The norm of a row moves by that of its rounding.
    for side, expected in ((longer, sigma), (shorter, torch.ones_like(sigma))):
        step = side.abs().amax(1) / 127
        assert ((side.norm(dim=1) - expected).abs() <= 0.51 * step * side.shape[1] ** 0.5).all()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (14, 14), (1, 6), (64, 16)])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_every_rank_has_a_size_of_its_own_up_to_the_dense_one(shape, item_bytes):
    """Rank to bytes and back, and a rank beyond what two 16-bit factors could hold."""
    rows, columns = shape
    dense = rows * columns * item_bytes
    tails = {"a_tail": max(0, columns - rows), "b_tail": max(0, rows - columns)}
    sizes = {}
    for rank in range(1, min(shape) + 1):
        module = LowRankInt8(out_features=rows, in_features=columns, rank=rank, **tails)
        sizes[module] = module.bytes(item_bytes)
    below = {module: size for module, size in sizes.items() if size < dense}
    for module, size in below.items():
        share = Fraction(size, dense)
        assert remapped_at(rows, columns, share, 1, item_bytes) == module
        less = remapped_at(rows, columns, share - Fraction(1, dense), 1, item_bytes)
        assert less.rank == max(1, module.rank - 1)
    assert len(set(below.values())) == len(below)
    if min(shape) > 6:
        assert max(module.rank for module in below) > rows * columns // (rows + columns)
    if len(below) < len(sizes):  # the scales of full rank exceed what 8 bits save
        assert isinstance(remapped_at(rows, columns, Fraction(1), 1, item_bytes), str)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    share=st.fractions(Fraction(1, 100), Fraction(6, 5)),
    multiple=st.sampled_from([1, 3, 8, 64]),
    item_bytes=st.sampled_from([2, 4]),
)
def test_an_artefact_is_within_its_share_or_the_matrix_stays_dense(
    rows, columns, share, multiple, item_bytes
):
    layer = layer_of(rows, columns, item_bytes)
    (module,) = DobiSvd().modules_at(layer, {"l.q_proj": share}, multiple).values()
    dense = layer.dense_bytes("l.q_proj")
    if isinstance(module, str):
        least = LowRankInt8(
            out_features=rows,
            in_features=columns,
            rank=1,
            a_tail=max(0, columns - rows),
            b_tail=max(0, rows - columns),
        ).bytes(item_bytes)
        assert share >= 1 or multiple > min(rows, columns) or multiple * least >= dense
    else:
        assert module.rank % multiple == 0
        assert module.bytes(item_bytes) < dense
        assert module.bytes(item_bytes) <= share * dense or module.rank == multiple


def test_without_remapping_ranks_are_those_of_two_factors():
    layer = layer_of(12, 20)
    shares = {"l.q_proj": Fraction(1, 2)}
    assert DobiSvd(remap=False).modules_at(layer, shares) == SvdLlm().modules_at(layer, shares)


@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_compressed_to_what_was_planned(shape, remap):
    weight, statistics = case(*shape)
    method, layer, path = DobiSvd(remap=remap), layer_of(*shape), "l.q_proj"
    wanted = method.modules_at(layer, {path: Fraction(1, 2)})
    assert isinstance(wanted[path], LowRankInt8 if remap else LowRank)
    block = Block(layer, {path: weight}, {path: None}, {path: statistics})
    made = method.compress(block, wanted).matrices[path].factors.to(torch.bfloat16)
    assert made.config() == wanted[path]
    stored = sum(tensor.nbytes for tensor in made.tensors(path).values())
    assert stored == wanted[path].bytes(2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_loss_is_the_dropped_tail_and_that_of_the_closed_form(shape, rank):
    weight, statistics = case(*shape)
    found = DobiSvd(remap=False).factorize(weight, statistics, rank)
    spectrum = DobiSvd().spectrum(weight, statistics)
    tail = float(spectrum[rank:].sum() / spectrum.sum())
    reference = SvdLlm().factorize(weight, statistics, rank)
    assert spectrum.shape == (min(shape),)
    energy = torch.trace(weight @ statistics.gram @ weight.T)
    assert float(spectrum.sum() / energy) == pytest.approx(1, rel=1e-12)
    for loss in (
        DobiSvd().factorize(weight, statistics, rank).loss,
        found.factors.output_error(weight, statistics.gram),
        reference.loss,
        tail,
    ):
        # The tail is summed of eigenvalues with an error of 1e-16 of the whole.
        assert loss == pytest.approx(found.loss, abs=1e-14)
    torch.testing.assert_close(found.factors.dense(), reference.factors.dense(), rtol=0, atol=1e-9)


def averaged_subspace(batches, rank):
    """The published heuristic: PCA of each batch's right singular vectors, without their values."""
    vectors = torch.cat([torch.linalg.svd(a, full_matrices=False).Vh[:rank] for a in batches])
    return left_of_gram(torch.cov(vectors.T), rank).basis


@pytest.mark.parametrize("seed", range(4))
def test_the_pooled_subspace_loses_less_than_the_average_of_subspaces(seed):
    """Batches of outputs that lie in few directions each, some of them with little energy."""
    weight, rank = random(24, 24, seed=seed), 8
    batches = []
    for number, loudness in enumerate((3.0, 1.0, 0.3, 0.1)):
        x = random(64, 24, seed=100 * seed + number) * 0.7 ** torch.arange(24)
        turn = torch.linalg.qr(random(24, 24, seed=100 * seed + number + 50)).Q
        batches.append(loudness * x @ turn @ weight.T)
    outputs = torch.cat(batches)
    inputs = torch.linalg.solve(weight, outputs.T).T
    gram = inputs.T @ inputs / len(inputs)

    def lost(basis):
        return float((outputs - outputs @ basis @ basis.T).square().sum())

    pooled = lost(output_subspace(weight, gram, rank).basis)
    assert pooled < 0.75 * lost(averaged_subspace(batches, rank))
    best = torch.linalg.svdvals(outputs)[rank:].square().sum()
    assert pooled == pytest.approx(float(best), rel=1e-9)


def degenerate():
    weight, statistics = case(12, 20, tokens=3)
    yield "fewer tokens than channels", weight, statistics.gram
    weight, statistics = case(20, 12, tokens=3)
    yield "fewer tokens than channels, tall", weight, statistics.gram
    for rows, columns in SHAPES:
        weight, statistics = case(rows, columns)
        gram = statistics.gram
        yield "all-zero weight", torch.zeros_like(weight), gram
        yield "no inputs", weight, torch.zeros_like(gram)
        dead = gram.clone()
        dead[:4], dead[:, :4] = 0, 0
        yield "dead channels", weight, dead
        outlier = torch.ones(columns, dtype=torch.float64)
        outlier[2] = 1000
        yield "an outlier channel", weight, outlier[:, None] * gram * outlier
        yield "a constant feature", weight, torch.ones_like(gram)
        huge = weight.clone()
        huge[3] *= 1e4
        yield "a huge row", huge, gram
        zeros = weight.bfloat16()
        zeros[:, ::3] = 0
        yield "bf16 with zeros", zeros, gram


@pytest.mark.parametrize("remap", [True, False])
def test_degenerate_inputs_give_finite_factors_of_the_rank_and_an_honest_loss(remap):
    for name, weight, gram in degenerate():
        found = DobiSvd(remap=remap).factorize(weight, LayerStatistics(gram=gram), 6)
        assert torch.isfinite(found.factors.to(torch.bfloat16).dense()).all(), name
        assert found.factors.rank == 6, name
        assert (0 <= found.loss <= 1) and found.damping == 0, name
        if not remap:
            measured = found.factors.output_error(weight, gram)
            assert measured == pytest.approx(found.loss, abs=1e-9), name


def test_remapping_changes_a_truncated_matrix_by_no_more_than_rounding():
    weight, statistics = case(12, 20)
    basis = output_subspace(weight, statistics.gram, 4).basis
    kept = basis @ basis.T @ weight
    made = remapped(weight, basis).to(torch.bfloat16)
    left, sigma, right = torch.linalg.svd(kept)
    A, B = sigma[:4, None] * right[:4], left[:, :4]
    assert ((made.dense() - kept).abs() <= rounding(A, B, made) + 1e-12).all()
