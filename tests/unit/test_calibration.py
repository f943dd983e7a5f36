"""Windows of text and the statistics of layer inputs, against the definitions written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.calibration import (
    ActivationError,
    TextError,
    collect,
    output_errors,
    sites,
    split,
)
from offline_compress.families import family_of
from offline_compress.methods import LowRankFactors
from offline_compress.reference import load

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def windows_of(tokens=4096, **changes):
    wanted = {"samples": 6, "held_out": 2, "context": 32, "seed": 0, "bos": None} | changes
    return split(torch.arange(100, 100 + tokens), **wanted)


@given(
    samples=st.integers(1, 9),
    held_out=st.integers(1, 5),
    context=st.integers(2, 40),
    extra=st.integers(0, 200),
    seed=st.integers(0, 1000),
    bos=st.sampled_from([None, 7]),
)
def test_windows_are_text_and_share_no_token(samples, held_out, context, extra, seed, bos):
    total = (samples + held_out) * context + extra
    found = windows_of(
        total, samples=samples, held_out=held_out, context=context, seed=seed, bos=bos
    )
    assert found.calibration.shape == (samples, context)
    assert len(found.held_out) == held_out * context
    body = found.calibration
    if bos is not None:
        assert (body[:, 0] == bos).all()
        body = body[:, 1:]
    assert (body.diff(dim=1) == 1).all()
    used = torch.cat([body.flatten(), found.held_out])
    assert len(used.unique()) == len(used)
    again = found.held_out_windows()
    assert again.shape[1] == context
    assert len(again) >= held_out


def test_the_seed_decides_the_offsets():
    first, again, other = (windows_of(seed=seed).calibration for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_text_one_token_too_short_is_refused_with_the_number_needed():
    windows_of(256)
    with pytest.raises(TextError, match=r"holds 255 tokens; 6 calibration .* need 256"):
        windows_of(255)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tiny_checkpoint):
    return load(tiny_checkpoint(request.param), "cpu", torch.float32)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 4096, (5, 16), generator=torch.Generator().manual_seed(3))


def inputs_of(model, path, windows):
    """Every input [tokens, n] of one linear layer, by a pass of its own."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.inference_mode():
        model(windows)
    hook.remove()
    return torch.cat(seen).double()


def test_statistics_are_the_moments_of_every_input(model, windows):
    observed = sites(family_of(model.config), model.config)
    found = collect(model, observed.values(), windows, batch=2)
    assert len(found) == 4 * model.config.num_hidden_layers
    for path, site in observed.items():  # the layers that share a site read the same input
        x, statistics = inputs_of(model, path, windows), found[site]
        assert statistics.tokens == len(x) == windows.numel()
        torch.testing.assert_close(statistics.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-6
        )
        assert torch.equal(statistics.gram, statistics.gram.T)


def test_the_batch_does_not_change_the_statistics(model, windows):
    path = "model.layers.1.mlp.down_proj"
    one, all_at_once = (collect(model, [path], windows, batch)[path] for batch in (1, 5))
    torch.testing.assert_close(one.gram, all_at_once.gram, rtol=1e-4, atol=1e-7)


def test_progress_counts_every_window_and_no_hook_stays(model, windows):
    seen = []
    path = "model.layers.0.self_attn.q_proj"
    collect(model, [path], windows, 2, lambda *step: seen.append(step))
    assert seen == [("calibration", done, 5) for done in (0, 2, 4, 5)]
    assert not model.get_submodule(path)._forward_pre_hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_layer_with_a_broken_input_is_named(tiny_checkpoint, windows, value):
    model = load(tiny_checkpoint("qwen3"), "cpu", torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = value
    paths = dict.fromkeys(sites(family_of(model.config), model.config).values())
    with pytest.raises(ActivationError, match=r"input of model\.layers\.0\.mlp\.down_proj is NaN"):
        collect(model, paths, windows, 2)


def test_the_measured_error_is_that_of_the_outputs(model, windows):
    errors, factors = {}, {}
    for index, name in enumerate(("self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")):
        path = f"model.layers.1.{name}"
        weight = model.get_submodule(path).weight.detach()
        generator = torch.Generator().manual_seed(index)
        basis, _ = torch.linalg.qr(torch.randn(len(weight), 9, generator=generator))
        factors[path] = LowRankFactors(A=basis.T @ weight, B=basis)
        x = inputs_of(model, path, windows)
        errors[path] = factors[path].output_error(weight, x.T @ x)
    pairs = {path: (pair.A, pair.B) for path, pair in factors.items()}
    found = output_errors(model, pairs, windows, batch=2)
    assert found == pytest.approx(errors, rel=1e-4)
