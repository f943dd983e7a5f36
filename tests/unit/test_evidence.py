"""What allocators are told, against the same quantities of the whole model at once."""

import math
from fractions import Fraction

import pytest
import torch
from runs import recipe_for
from torch.nn import functional

from offline_compress import evidence
from offline_compress.calibration import GRADIENTS, LayerStatistics
from offline_compress.calibration.gradients import gradient_moments
from offline_compress.methods import SvdLlm
from offline_compress.planning import layers_of, matrices_of
from offline_compress.progress import silent
from offline_compress.reference import load
from offline_compress.workspace import Workspace

UPDATED = {"name": "svd_llm", "update": True}
PATH = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3_moe"])
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def model(directory):
    return load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def windows():
    """More than the losses of whole models are measured on."""
    return torch.randint(0, 4096, (10, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def gathered(directory, network_of, streams_of, windows, tmp_path_factory):
    """Evidence for an allocator and a method."""

    def gather(allocator, method="svd_llm", kept=0.5):
        network = network_of(directory)
        recipe = recipe_for("text", method, kept, allocator)
        layers = layers_of(network.source)
        work = Workspace(tmp_path_factory.mktemp("work"))

        def keep(index, found):
            tensors = {
                f"{p}|{name}": m for p, all_of in found.items() for name, m in all_of.items()
            }
            work.save(f"gradients-{index}", tensors)

        if needs := recipe.weights.method.needs & GRADIENTS:
            shapes = {index: layer.shapes for index, layer in enumerate(layers)}
            gradient_moments(network, windows, shapes, needs, keep, work.directory, batch=4)
        return evidence.gather(
            recipe,
            network,
            layers,
            matrices_of(layers, recipe.weights.method),
            streams_of(network, windows, batch=4),
            windows,
            work,
            silent,
        )

    return gather


@torch.no_grad()
def seen_by(model, path, windows):
    """Every input [tokens, n] of a linear layer."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    model(windows)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def nats(model, windows):
    logits = model(windows).logits[:, :-1].double()
    return float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@torch.no_grad()
def test_influence_is_how_far_a_layer_turns_its_input(gathered, model, windows):
    turned = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: turned.append((inputs[0], output)))
        for layer in model.model.layers
    ]
    model(windows)
    for hook in hooks:
        hook.remove()
    expected = []
    for before, behind in turned:
        behind = behind[0] if isinstance(behind, tuple) else behind
        cosine = functional.cosine_similarity(before.double(), behind.double(), dim=-1)
        expected.append(1 - float(cosine.mean()))
    found = gathered("block_influence")
    assert found.influence == pytest.approx(expected, rel=1e-5)
    assert (found.spectra, found.loss, found.gated, found.menus) == (None, None, None, None)


def test_spectra_are_sums_over_the_tokens_that_a_matrix_sees(gathered, model, windows):
    """Of an expert over its own ones."""
    found = gathered("truncation_loss")
    assert found.spectra.keys() == found.matrices.keys()
    assert found.loss is None and found.windows == len(windows)
    for path, spectrum in found.spectra.items():
        x = seen_by(model, path, windows)
        weight = model.get_submodule(path).weight.detach().double()
        outputs = x @ weight.T  # whose squared singular values the spectrum holds
        expected = torch.linalg.svdvals(outputs).square()[: len(spectrum)]
        assert len(spectrum) == min(weight.shape)
        assert (spectrum.diff() <= 0).all()
        total = float(expected.sum())
        assert float(spectrum.sum()) == pytest.approx(total, rel=1e-5)
        torch.testing.assert_close(spectrum[: len(expected)], expected, rtol=0, atol=1e-5 * total)


@pytest.mark.parametrize("method", ["svd_llm", UPDATED, "asvd"], ids=str)
def test_losses_are_those_of_the_model_with_these_matrices_truncated(
    gathered, model, windows, method
):
    """In the dense model there is nothing that an update could make up for."""
    loss = gathered("strs", method).loss
    some = windows[:8]
    dense = loss({})
    assert dense == pytest.approx(nats(model, some), rel=1e-6)
    shares = {PATH: Fraction(1, 4), "model.layers.0.self_attn.q_proj": Fraction(1, 2)}
    found = loss(shares)
    assert abs(found - dense) > 1e-5
    assert loss({}) == dense  # the weights are back
    assert loss({PATH: Fraction(1)}) == dense
    if method == "asvd":
        return
    kept = {}
    for path, share in shares.items():
        x = seen_by(model, path, windows)
        layer = model.get_submodule(path)
        rows, columns = layer.weight.shape
        statistics = LayerStatistics(gram=x.T @ x / len(x))
        rank = int(share * rows * columns / (rows + columns))
        kept[path] = layer.weight.data
        made = SvdLlm().factorize(layer.weight.detach(), statistics, rank)
        layer.weight.data = made.factors.dense().float()
    try:
        assert found == pytest.approx(nats(model, some), rel=1e-5)
    finally:
        for path, weight in kept.items():
            model.get_submodule(path).weight.data = weight


def test_the_gated_loss_is_the_models_where_every_gate_is_open(gathered, model, windows):
    found = gathered("learned")
    open_gates = {path: torch.tensor(1e4) for path in found.matrices}
    for window in (0, 9):
        exact = nats(model, windows[window : window + 1])
        assert float(found.gated(open_gates, window)) == pytest.approx(exact, rel=1e-5)
    closed = open_gates | {PATH: torch.tensor(0.0)}
    assert float(found.gated(closed, 0)) != pytest.approx(nats(model, windows[:1]), rel=1e-4)


def test_a_menu_offers_every_matrix_as_it_is_and_smaller_for_a_loss(gathered):
    """Predicted with the gradient moments that wait in the work directory."""
    found = gathered("knapsack", "auto")
    assert found.menus.keys() == found.matrices.keys()
    for menu in found.menus.values():
        losses = {offer.share: offer.loss for offer in menu}
        assert losses.pop(Fraction(1)) == 0
        assert all(0 < share < 1 for share in losses)
        assert all(math.isfinite(loss) and loss >= 0 for loss in losses.values())
