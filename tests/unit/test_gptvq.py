"""GPTVQ: the whole against plain rounding, sizes, degenerate inputs."""

from fractions import Fraction

import pytest
import torch
from grams import gram_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.linalg.hessian import damped_hessian
from offline_compress.methods import Block, Layer, strips
from offline_compress.methods.gptvq import INDEX_BITS, Gptvq
from offline_compress.methods.strips import energy, strips_of
from vllm_svd.format import Codebook


def module_of(rows, columns, dim=2, bits=4, group_rows=None, group_columns=64):
    return Codebook(
        out_features=rows,
        in_features=columns,
        dim=dim,
        index_bits=bits,
        group_rows=group_rows or rows,
        group_columns=group_columns,
    )


def quantized(weight, gram, module, **options):
    statistics = LayerStatistics(shifted_gram=gram)
    return Gptvq(**options).quantize(weight, statistics, module)


@pytest.mark.parametrize(("dim", "bits"), [(1, 3), (2, 4), (2, 6), (4, 6)])
@pytest.mark.parametrize("columns", [64, 58])
def test_the_objective_falls_at_every_stage(dim, bits, columns):
    weight, gram = normal(60, columns), gram_of(columns, outlier=10.0)
    module = module_of(60, columns, dim, bits, group_rows=25, group_columns=32)
    nearest, feedback, update, descent, int8 = Gptvq().objectives(weight, gram, module)
    assert nearest > feedback > update > descent > 0
    assert int8 < 1.1 * descent
    found = quantized(weight, gram, module)
    hessian = damped_hessian(gram, 0.01).matrix
    assert found.factors.output_error(weight, hessian) == pytest.approx(int8, rel=1e-9)
    assert found.loss == pytest.approx(found.factors.output_error(weight, gram), rel=1e-12)
    assert found.damping == 0.01


@settings(max_examples=20)
@given(
    dim=st.sampled_from([1, 2, 4]), bits=st.integers(1, 5), vectors=st.integers(2, 10),
    seed=st.integers(0, 20),
)  # fmt: skip
def test_few_distinct_values_are_restored_exactly(dim, bits, vectors, seed):
    """At most 2^bits vectors of whole steps, the largest of which is 127."""
    columns = dim * vectors
    generator = torch.Generator().manual_seed(seed)
    values = 8 * torch.randint(-15, 16, (1 << bits, dim), generator=generator)
    values[0] = 127
    chosen = torch.randint(1 << bits, (24, vectors), generator=generator)
    chosen[:, 0] = 0
    weight = (values[chosen].flatten(1) * 2.0**-9).to(torch.bfloat16)
    module = module_of(24, columns, dim, bits, group_columns=256)
    found = quantized(weight, gram_of(columns, 0.5), module)
    assert torch.equal(found.factors.dense(), weight.double())
    assert found.loss == 0


def test_the_error_falls_with_every_bit():
    weight, gram = normal(64, 32), gram_of(32)
    for dim, bits in ((1, range(1, 7)), (2, range(1, 8)), (4, range(1, 8, 2))):
        losses = [quantized(weight, gram, module_of(64, 32, dim, b)).loss for b in bits]
        assert losses == sorted(losses, reverse=True)


def rounded_to_nearest(weight, bits, group):
    """Symmetric uniform steps, the scale of every `group` columns of a row its largest entry."""
    largest = 2 ** (bits - 1) - 0.5
    groups = weight.reshape(len(weight), -1, group)
    scale = groups.abs().amax(2, keepdim=True) / largest
    steps = (groups / scale - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
    return (steps * scale).flatten(1)


@pytest.mark.parametrize(("dim", "bits"), [(1, 2), (2, 4), (4, 8), (1, 3), (2, 6), (1, 4)])
def test_it_beats_rounding_to_nearest_that_has_more_bytes(dim, bits):
    weight, gram = normal(256, 128), gram_of(128)
    module = Gptvq(dim=dim, index_bits=bits).sized(256, 128, dim, bits)
    plain = bits // dim
    group = 16  # columns that share an fp16 scale: one bit more per weight
    plain_bytes = 256 * 128 * plain // 8 + 256 * 128 // group * 2
    assert module.bytes(2) <= plain_bytes
    error = weight - rounded_to_nearest(weight, plain, group)
    lost = float(energy(error[None], gram) / energy(weight[None], gram))
    assert quantized(weight, gram, module).loss < 0.5 * lost


def gram_few_tokens(width):
    x = normal(width // 4, width)
    return x.T @ x / len(x)


def dead(gram):
    gram[3:7], gram[:, 3:7] = 0, 0
    return gram


GRAMS = {
    "ordinary": gram_of,
    "zero": lambda width: torch.zeros(width, width),
    "few tokens": gram_few_tokens,
    "dead channels": lambda width: dead(gram_of(width)),
    "constant features": lambda width: torch.ones(width, width),
    "outlier 1000x": lambda width: gram_of(width, outlier=1e3),
    "tiny": lambda width: gram_of(width) * 1e-30,
}
WEIGHTS = {
    "ordinary": lambda weight: weight,
    "zero": torch.zeros_like,
    "one huge row": lambda weight: torch.cat([weight[:-1], 1e3 * weight[-1:]]),
    "bf16 with zeros": lambda weight: (weight * (weight > 0)).to(torch.bfloat16),
    "constant": torch.ones_like,
}


@pytest.mark.parametrize(
    ("gram", "weight", "damping"),
    [
        *((gram, weight, 0.01) for gram in GRAMS for weight in WEIGHTS),
        *((gram, "one huge row", 0.0) for gram in GRAMS),
    ],
)
def test_degenerate_inputs_give_finite_weights_of_the_planned_size(gram, weight, damping):
    second, matrix = GRAMS[gram](39), WEIGHTS[weight](normal(21, 39))
    module = module_of(21, 39, dim=2, bits=4, group_rows=8, group_columns=16)
    found = quantized(matrix, second, module, damping=damping)
    assert found.factors.config() == module
    dense = found.factors.dense()
    assert dense.isfinite().all()
    assert 0 <= found.loss < 0.2
    assert found.damping >= damping
    singular = {"few tokens", "dead channels", "constant features"}
    assert (found.damping > 0) == (damping > 0 or gram in singular)
    if weight == "zero":
        assert not dense.any()
    if weight == "one huge row":  # its strip suffers, the others do not
        metric = second if second.any() else torch.eye(39)
        lost, total = (energy(x[None, :16], metric.double()) for x in (matrix - dense, matrix))
        assert lost < 0.2 * total


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_matrices_smaller_than_a_group_or_a_vector(shape, dim):
    weight = normal(*shape)
    module = module_of(*shape, dim=dim, bits=6, group_columns=256)
    found = quantized(weight, gram_of(shape[1]), module)
    assert found.factors.config() == module
    # 64 centroids for at most 45 vectors: only the int8 steps are lost
    step = float(weight.abs().max()) / 127
    assert (weight - found.factors.dense()).abs().max() <= step


def test_strips_are_those_of_the_matrix_however_many_at_once(monkeypatch):
    weight = normal(23, 10).to(torch.bfloat16)
    module = module_of(23, 10, dim=4, group_rows=5, group_columns=8)
    for at_once in (1, 2 * 5 * 12, 1 << 22):
        monkeypatch.setattr(strips, "_AT_ONCE", at_once)
        pieces = list(strips_of(weight, module))
        assert sum(len(piece) for piece in pieces) == module.groups[0]
        rows = torch.cat([piece.flatten(0, 1) for piece in pieces])
        assert torch.equal(rows[:, :10], weight.double())
        assert not rows[:, 10:].any()
    monkeypatch.setattr(strips, "_AT_ONCE", 1)
    weight, gram = normal(60, 32), gram_of(32)
    module = module_of(60, 32, group_rows=25)
    one_by_one = quantized(weight, gram, module).loss
    monkeypatch.undo()
    assert one_by_one == pytest.approx(quantized(weight, gram, module).loss, rel=0.1)


# Sizes.

LAYER = Layer("l", {"l.up": (96, 64), "l.down": (40, 130)}, 4, 2, 16, item_bytes=2)


@given(
    share=st.fractions(Fraction(1, 100), Fraction(99, 100)), dim=st.sampled_from([1, 2, 4, None])
)
def test_a_share_buys_the_most_bits_that_fit(share, dim):
    method = Gptvq(dim=dim, group_columns=32)
    for path, module in method.modules_at(LAYER, dict.fromkeys(LAYER.shapes, share)).items():
        rows, columns = LAYER.shapes[path]
        limit = share * LAYER.dense_bytes(path)
        offers = [
            method.sized(rows, columns, d, bits)
            for d in ((dim,) if dim else INDEX_BITS)
            for bits in range(1, INDEX_BITS[d] + 1)
        ]
        fitting = [o for o in offers if o.bytes(2) <= limit]
        assert isinstance(module, Codebook)
        if not fitting:
            assert module.bytes(2) == min(o.bytes(2) for o in offers)
            continue
        assert module in fitting
        rate = Fraction(module.index_bits, module.dim)
        assert all(Fraction(o.index_bits, o.dim) <= rate for o in fitting)
        assert all(o.dim <= module.dim for o in fitting if Fraction(o.index_bits, o.dim) == rate)


@given(
    rows=st.integers(1, 300), columns=st.integers(1, 300), bits=st.integers(1, 8),
    dim=st.sampled_from([1, 2, 4]), overhead=st.floats(0.01, 2),
)  # fmt: skip
def test_codebooks_stay_below_the_overhead_unless_there_is_one_strip(
    rows, columns, bits, dim, overhead
):
    module = Gptvq(overhead=overhead).sized(rows, columns, dim, bits)
    stored = module.parts()
    codebook_bits = 8 * (stored["codebooks"].bytes(2) + stored["scales"].bytes(2))
    assert module.groups[0] == 1 or codebook_bits <= overhead * rows * columns * (1 + 1e-12)


def test_options_of_the_user_are_kept_within_the_share():
    path = {"l.up": Fraction(1, 2)}
    assert Gptvq(index_bits=3).modules_at(LAYER, path)["l.up"].index_bits == 3
    chosen = Gptvq(group_rows=7, group_columns=16).modules_at(LAYER, path)["l.up"]
    assert (chosen.group_rows, chosen.group_columns) == (7, 16)
    tight = {"l.up": Fraction(1, 8)}
    assert Gptvq(index_bits=8).modules_at(LAYER, tight)["l.up"].index_bits < 8
    assert "all of it" in Gptvq().modules_at(LAYER, {"l.up": Fraction(1)})["l.up"]
    tiny = Layer("l", {"l.up": (2, 2)}, 1, 1, 2, item_bytes=2)
    assert "the matrix 8" in Gptvq().modules_at(tiny, {"l.up": Fraction(1, 2)})["l.up"]


def test_a_block_is_compressed_as_planned_from_the_moments_it_asks_for():
    weights = {path: normal(*shape) for path, shape in LAYER.shapes.items()}
    for sequential, moment in ((True, "shifted_gram"), (False, "gram")):
        method = Gptvq(sequential=sequential)
        assert method.needs == {moment}
        statistics = {
            path: LayerStatistics(**{moment: gram_of(shape[1])})
            for path, shape in LAYER.shapes.items()
        }
        wanted = method.modules_at(LAYER, dict.fromkeys(LAYER.shapes, Fraction(1, 4)))
        block = Block(LAYER, weights, dict.fromkeys(LAYER.shapes), statistics)
        made = method.compress(block, wanted).matrices
        assert {path: found.factors.config() for path, found in made.items()} == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 2, "index_bits": 9}, "index_bits 9 exceeds 8"),
        ({"dim": 4, "group_columns": 30}, "take 32"),
        ({"dim": None, "group_columns": 6}, "no multiple of dim 4"),
        ({"dim": 3}, "dim"),
        ({"damping": float("nan")}, "damping"),
        ({"overhead": 0}, "overhead"),
    ],
)
def test_options_that_the_format_has_no_room_for_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        Gptvq(**options)
