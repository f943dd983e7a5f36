"""Windows of text and the statistics of layer inputs, against the definitions written out."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.calibration import (
    ActivationError,
    LayerStatistics,
    TextError,
    collect,
    gram_bytes,
    groups,
    output_errors,
    sites,
    split,
)
from offline_compress.families import family_of
from offline_compress.methods import LowRankFactors, SvdLlm
from offline_compress.methods.svd_llm import output_form
from offline_compress.reference import load

ROOT = Path(__file__).parents[2]
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
    found = collect(model, observed.values(), windows, 2, "gram")
    assert len(found) == 4 * model.config.num_hidden_layers
    for path, site in observed.items():  # the layers that share a site read the same input
        x, statistics = inputs_of(model, path, windows), found[site]
        assert statistics.tokens == len(x) == windows.numel()
        torch.testing.assert_close(statistics.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-6)
        assert torch.equal(statistics.gram, statistics.gram.T)


def test_the_batch_does_not_change_the_statistics(model, windows):
    path = "model.layers.1.mlp.down_proj"
    one, all_at_once = (collect(model, [path], windows, batch, "gram")[path] for batch in (1, 5))
    torch.testing.assert_close(one.gram, all_at_once.gram, rtol=1e-4, atol=1e-7)


def test_only_what_a_method_needs_is_gathered(model, windows):
    path = "model.layers.0.mlp.down_proj"
    seen = []
    nothing = collect(model, [path], windows, 2, "nothing", lambda *step: seen.append(step))
    assert (nothing, seen) == ({path: LayerStatistics()}, [])  # not even a pass
    means = collect(model, [path], windows, 2, "mean_abs")[path]
    both = collect(model, [path], windows, 2, "gram")[path]
    assert means.gram is None
    assert torch.equal(means.gathered("mean_abs"), both.mean_abs)
    with pytest.raises(LookupError, match="gathered no gram"):
        means.gathered("gram")


class Layer(torch.nn.Module):
    """A decoder of one linear layer, whose input is given."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.linear = inputs, torch.nn.Linear(inputs.shape[-1], 1, bias=False)
        self.base_model, self.device = self._forward, torch.device("cpu")

    def _forward(self, input_ids, use_cache):
        assert not use_cache
        self.linear(self.inputs[input_ids])


def outliers(dtype, channels=96, tokens=4096):
    """Channels of unequal scale around a common offset, the first with values of 1e4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator) * torch.logspace(-3, 0, channels)
    x[:, 0] *= 1e7
    return (x + 30 * torch.randn(channels, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_of_outliers_costs_svd_llm_nothing_in_its_tall_form(dtype):
    """Against the optimum, which the other form finds from the exact Gram."""
    layer = Layer(outliers(dtype).float())
    x = layer.inputs.double()
    gram = x.T @ x / len(x)
    windows = torch.arange(len(x)).view(-1, 64)
    found = collect(layer, ["linear"], windows, 4, "gram")["linear"]
    torch.testing.assert_close(found.gram, gram, rtol=1e-12, atol=0)
    weight = torch.randn(240, 96, generator=torch.Generator().manual_seed(1))
    for rank in (5, 40, 68):
        made = SvdLlm().factorize(weight, found, rank)
        optimal = output_form(weight, gram, rank).factors.output_error(weight, gram)
        assert made.factors.output_error(weight, gram) <= 1.1 * optimal
        assert made.loss == pytest.approx(made.factors.output_error(weight, gram), rel=1e-3)


def test_collecting_holds_one_copy_of_every_gram():
    """Peak resident memory of a process of its own, in units of all Grams."""
    script = """
import torch
from tests.unit.test_calibration import Layer, collect

def status(field):
    rows = open("/proc/self/status").read().splitlines()
    return int(next(row for row in rows if row.startswith(field)).split()[1]) * 1024

torch.set_num_threads(1)
layer = Layer(torch.randn(64, 1500))
layer.layers = torch.nn.ModuleList(torch.nn.Linear(1500, 1, bias=False) for _ in range(8))
layer.base_model = lambda input_ids, **_: [one(layer.inputs[input_ids]) for one in layer.layers]
windows = torch.arange(64).view(4, 16)
collect(layer, ["layers.0"], windows, 2, "gram")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = status("VmRSS")
found = collect(layer, [f"layers.{i}" for i in range(8)], windows, 2, "gram")
print((status("VmHWM") - before) / sum(one.gram.nbytes for one in found.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.4


@given(st.lists(st.integers(1, 40)), st.integers(0, 20000))
def test_groups_hold_every_site_in_order_within_the_budget(widths, budget):
    sites_of = {f"site{index}": width for index, width in enumerate(widths)}
    made = groups(sites_of, budget)
    assert [item for group in made for item in group.items()] == list(sites_of.items())
    for group in made:
        assert gram_bytes(group.values()) <= budget or len(group) == 1
    for group, following in pairwise(made):  # none ends early
        first = next(iter(following.values()))
        assert gram_bytes([*group.values(), first]) > budget


def test_progress_counts_every_window_and_no_hook_stays(model, windows):
    seen = []
    path = "model.layers.0.self_attn.q_proj"
    collect(model, [path], windows, 2, "mean_abs", lambda *step: seen.append(step))
    assert seen == [("calibration", done, 5) for done in (0, 2, 4, 5)]
    assert not model.get_submodule(path)._forward_pre_hooks


@pytest.mark.parametrize("needs", ["mean_abs", "gram"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_layer_with_a_broken_input_is_named(tiny_checkpoint, windows, value, needs):
    model = load(tiny_checkpoint("qwen3"), "cpu", torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = value
    paths = dict.fromkeys(sites(family_of(model.config), model.config).values())
    with pytest.raises(ActivationError, match=r"input of model\.layers\.0\.mlp\.down_proj is NaN"):
        collect(model, paths, windows, 2, needs)


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
