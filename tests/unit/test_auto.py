"""The project's own method: offers, predictions, and what it makes of them."""

from fractions import Fraction

import pytest
import torch

from offline_compress.calibration import LayerStatistics
from offline_compress.methods import Auto, Layer
from offline_compress.methods.auto import balanced, distortion
from vllm_svd.format import Codebook, LowRankInt8

# Max, IRE Trans. IT-6 (1960), table 1: mean squared error of the optimal quantiser of a Gaussian.
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def statistics_of(x, shifted=None, gradients=None, rows=24):
    shifted = x if shifted is None else shifted
    g = normal(len(x), rows, seed=5) if gradients is None else gradients
    count = len(x)
    return LayerStatistics(
        gram=x.T @ x / count,
        tokens=count,
        mean=x.mean(0),
        shifted_mean=shifted.mean(0),
        shifted_gram=shifted.T @ shifted / count,
        shift=(x - shifted).T @ shifted / count,
        output_gram=g.T @ g / count,
    )


def inputs(width=16, tokens=600, mean=0.5, seed=1):
    return normal(tokens, width, seed=seed) @ normal(width, width, seed=2) + mean


def layer_of(rows, columns):
    path = "model.layers.0.mlp.up_proj"
    return Layer("model.layers.0", {path: (rows, columns)}, 4, 2, 8, item_bytes=2), path


@pytest.mark.parametrize("bits", MAX_1960)
def test_the_distortion_of_scalar_codebooks_is_the_published_table(bits):
    assert distortion(bits, 1) == pytest.approx(MAX_1960[bits], rel=0.04)


def test_more_bits_and_more_dimensions_distort_less():
    for dim in (1, 2, 4):
        errors = [distortion(bits, dim) for bits in range(1, 9)]
        assert errors == sorted(errors, reverse=True)
    for bits in range(1, 9):
        assert distortion(bits, 4) < distortion(bits, 2) < distortion(bits, 1)
        assert distortion(bits, 4) > 4.0**-bits  # Shannon


def test_every_offer_is_found_again_by_its_share():
    layer, path = layer_of(24, 16)
    auto = Auto()
    weight, statistics = normal(24, 16), statistics_of(inputs())
    for share, loss in auto.menu(layer, path, weight, statistics):
        assert loss >= 0
        module = auto.modules_at(layer, {path: share})[path]
        if share == 1:
            assert isinstance(module, str)
        else:
            assert Fraction(module.bytes(2), layer.dense_bytes(path)) == share


def test_without_an_exact_size_the_largest_codebook_that_fits():
    layer, path = layer_of(256, 256)
    for share in (Fraction(1, 5), Fraction(1, 3), Fraction(1, 2)):
        module = Auto().modules_at(layer, {path: share})[path]
        assert isinstance(module, Codebook)
        assert module.bytes(2) <= share * layer.dense_bytes(path)
        for other in Auto().offers(256, 256):
            if isinstance(other, Codebook) and other.bytes(2) == module.bytes(2):
                assert other.dim <= module.dim


def test_a_share_below_every_offer_gets_the_smallest():
    layer, path = layer_of(24, 16)
    module = Auto().modules_at(layer, {path: Fraction(1, 1000)})[path]
    assert module.bytes(2) == min(offer.bytes(2) for offer in Auto().offers(24, 16))


def test_predicted_codebook_losses_are_of_the_right_size():
    """Within a factor of two of the loss in the same metric, for Gaussian weights."""
    layer, path = layer_of(64, 32)
    x = inputs(32, 2000, mean=0.0)
    weight, statistics = normal(64, 32), statistics_of(x, rows=64)
    auto = Auto()
    predicted = dict(auto.menu(layer, path, weight, statistics))
    for offer in auto.offers(64, 32):
        if not isinstance(offer, Codebook) or (offer.dim, offer.index_bits) not in {(1, 3), (2, 6)}:
            continue
        made = auto.approximate(weight, statistics, offer).factors.dense()
        error = weight - made
        real = torch.trace(statistics.output_gram @ error @ statistics.gram @ error.T) / 2
        share = Fraction(offer.bytes(2), layer.dense_bytes(path))
        assert 0.5 < predicted[share] / float(real) < 2


@pytest.mark.parametrize("kind", [Codebook, LowRankInt8])
def test_the_correction_removes_the_mean_error_of_the_shifted_output(kind):
    x = inputs()
    shifted = x + 0.3 * normal(*x.shape, seed=7) + 0.2
    weight, statistics = normal(24, 16), statistics_of(x, shifted)
    offer = next(o for o in Auto().offers(24, 16) if isinstance(o, kind))
    found = Auto().approximate(weight, statistics, offer).factors
    error = x @ weight.T - found.apply(shifted)
    assert error.mean(0).abs().max() < 1e-12 * 1e3
    assert found.config() == offer


def test_the_shifted_target_is_the_least_squares_map_from_shifted_inputs():
    x = inputs()
    shifted = 0.8 * x + 0.5 * normal(*x.shape, seed=7)
    weight, statistics = normal(24, 16), statistics_of(x, shifted)
    _, target = Auto(damping=0.0)._shifted(weight, statistics)
    a, b = (values - values.mean(0) for values in (shifted, x))
    solved = torch.linalg.lstsq(a, b @ weight.T).solution.T
    torch.testing.assert_close(target, solved, rtol=0, atol=1e-9)
    _, plain = Auto(shift=0.0)._shifted(weight, statistics)
    assert torch.equal(plain, weight)


def test_aiming_at_the_dense_output_loses_less_of_it():
    x = inputs()
    shifted = 0.8 * x + 0.5 * normal(*x.shape, seed=7)
    weight, statistics = normal(24, 16), statistics_of(x, shifted)
    offer = max(Auto().offers(24, 16), key=lambda o: o.bytes(2) * isinstance(o, Codebook))
    errors = []
    for shift in (1.0, 0.0):
        found = Auto(shift=shift).approximate(weight, statistics, offer).factors
        errors.append(float((x @ weight.T - found.apply(shifted)).square().sum()))
    assert errors[0] < errors[1]


def test_balanced_factors_have_the_same_product_and_equal_norms():
    A, B = normal(3, 8) * torch.tensor([1e6, 1.0, 0.0])[:, None], normal(9, 3)
    a, b = balanced(A, B)
    torch.testing.assert_close(b @ a, B @ A)
    torch.testing.assert_close(a.norm(dim=1)[:2], b.norm(dim=0)[:2])


@pytest.mark.parametrize("kind", ["dead", "constant", "few tokens", "huge row", "zero weight"])
def test_hostile_inputs_give_finite_artefacts(kind):
    x, weight = inputs(), normal(24, 16)
    if kind == "dead":
        x = x * 0
    if kind == "constant":
        x = torch.ones_like(x)
    if kind == "few tokens":
        x = x[:3]
    if kind == "huge row":
        weight[3] *= 1e4
    if kind == "zero weight":
        weight = weight * 0
    statistics = statistics_of(x)
    layer, path = layer_of(24, 16)
    assert all(loss >= 0 for _, loss in Auto().menu(layer, path, weight, statistics))
    for offer in list(Auto().offers(24, 16))[::5]:
        found = Auto().approximate(weight, statistics, offer)
        assert all(
            torch.isfinite(part).all()
            for part in found.factors.tensors("").values()
            if part.is_floating_point()
        )
