"""The gated calibration loss of a real, tiny transformers model."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from offline_compress.calibration.gates import GatedModel
from offline_compress.linalg import left_of_gram
from vllm_svd.errors import SvdError

WIDE = 200.0  # a position far above every rank
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.3,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def windows():
    return torch.randint(64, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bases(model, windows):
    """Leading eigenvectors of W C W^T, from the model's own inputs."""
    grams, hooks = {}, []
    for path in linears(model):

        def add(module, inputs, path=path):
            x = inputs[0].detach().flatten(0, -2).double()
            a = x @ module.weight.detach().double().T
            grams[path] = grams.get(path, 0) + a.T @ a

        hooks.append(model.get_submodule(path).register_forward_pre_hook(add))
    model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return {path: left_of_gram(gram, len(gram)).basis.float() for path, gram in grams.items()}


def linears(model):
    return [name for name, module in model.named_modules() if name.endswith("_proj")]


def plain(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return float(functional.cross_entropy(logits[:-1], ids[1:]))


def at(paths, position, **options):
    return {path: torch.tensor(position, dtype=torch.float64, **options) for path in paths}


MODES = pytest.mark.parametrize("mode", ["activations", "spectrum"])


@MODES
def test_open_gates_leave_the_loss_as_it_is_and_closed_ones_do_not(model, windows, bases, mode):
    gated = GatedModel(model, windows, beta=1.0, mode=mode, bases=bases)
    for window, ids in enumerate(windows):
        exact = plain(model, ids)
        # Two layers, seven products each: hundreds of roundings of the hidden states.
        assert float(gated(at(linears(model), WIDE), window)) == pytest.approx(exact, abs=2e3 * EPS)
        changes = [float(gated(at(linears(model), k), window)) - exact for k in (16.0, 4.0)]
        assert all(abs(change) > 1e-3 for change in changes)


def test_a_sharp_gate_in_the_spectrum_is_the_projected_weight(model, windows, bases):
    path, rank = "model.layers.0.mlp.down_proj", 9
    gated = GatedModel(model, windows, beta=1e3, bases=bases)
    truncated = float(gated(at([path], float(rank)), 1))
    linear = model.get_submodule(path)
    dense, basis = linear.weight.data, bases[path][:, :rank]
    linear.weight.data = basis @ basis.T @ dense
    projected = plain(model, windows[1])
    linear.weight.data = dense
    assert truncated == pytest.approx(projected, abs=2e3 * EPS)
    assert abs(projected - plain(model, windows[1])) > 1e-3


def test_a_sharp_gate_on_activations_is_their_best_approximation(model, windows):
    """Of the outputs without their bias."""
    path, rank = "model.layers.1.self_attn.q_proj", 5
    found = []

    def keep(module, _, output):
        left, values, right = torch.linalg.svd(output[0] - module.bias, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank] + module.bias
        found.append(best)
        return best[None]

    hook = model.get_submodule(path).register_forward_hook(keep)
    exact = plain(model, windows[0])
    hook.remove()
    gated = GatedModel(model, windows, beta=1e3, mode="activations")
    assert found
    assert float(gated(at([path], float(rank)), 0)) == pytest.approx(exact, abs=2e3 * EPS)


@MODES
def test_slopes_are_those_of_finite_differences(model, windows, bases, mode):
    """In fp64, with gates on every layer: what a gate does to later layers counts."""
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    for name, module in list(double.named_modules()):
        if name.endswith("norm"):  # transformers' own computes in fp32, whatever its input
            norm = torch.nn.RMSNorm(32, model.config.rms_norm_eps, dtype=torch.float64)
            norm.weight.data = module.weight.data
            double.set_submodule(name, norm)
    wide = {path: basis.double() for path, basis in bases.items()}
    gated = GatedModel(double, windows, beta=0.3, mode=mode, bases=wide)
    positions = at(linears(model), 11.3, requires_grad=True)
    slopes = torch.autograd.grad(gated(positions, 2), list(positions.values()))
    still, step = at(positions, 11.3), 1e-4
    for path, slope in list(zip(positions, slopes, strict=True))[::3]:
        ends = []
        for moved in (step, -step):
            ends.append(float(gated(still | {path: still[path] + moved}, 2)))
        difference = (ends[0] - ends[1]) / (2 * step)
        assert float(slope) == pytest.approx(difference, rel=1e-5, abs=1e-8)


@MODES
def test_recomputed_layers_have_the_same_loss_and_slopes(model, windows, bases, mode):
    found = []
    for checkpointing in (False, True):
        gated = GatedModel(
            model, windows, beta=0.3, mode=mode, bases=bases, checkpointing=checkpointing
        )
        positions = at(linears(model), 11.3, requires_grad=True)
        loss = gated(positions, 0)
        found.append((loss.detach(), *torch.autograd.grad(loss, list(positions.values()))))
    assert any(float(slope) for slope in found[0][1:])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_the_model_is_left_as_it_was(model, windows, bases):
    frozen = model.lm_head.weight.requires_grad_(False)
    gated = GatedModel(model, windows, beta=1.0, bases=bases, checkpointing=True)
    positions = at(linears(model), 8.0, requires_grad=True)
    gated(positions, 0).backward()
    gated.bases = {path: basis[1:] for path, basis in bases.items()}
    with pytest.raises(RuntimeError):  # inside a hook
        gated(positions, 0)
    assert all(positions[path].grad is not None for path in positions)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    frozen.requires_grad_(True)
    for module in model.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_a_position_that_nothing_reads_has_no_slope(model, windows, bases):
    """As that of an expert that no token reached."""
    gated = GatedModel(model, windows, beta=1.0, bases=bases)
    unread = torch.nn.Linear(32, 32, bias=False)
    model.add_module("unread", unread)
    gated.bases = {**bases, "unread": torch.eye(32)}
    positions = at(["unread", linears(model)[0]], 8.0, requires_grad=True)
    for paths in (["unread"], list(positions)):
        loss = gated({path: positions[path] for path in paths}, 0)
        slopes = torch.autograd.grad(loss, [positions[path] for path in paths])
        assert float(slopes[0]) == 0
    del model.unread
    assert float(slopes[1]) != 0


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_without_a_token_to_predict_are_refused(model, shape):
    with pytest.raises(SvdError, match=r"context of at least 2"):
        GatedModel(model, torch.zeros(shape, dtype=torch.long), beta=1.0)
