"""Statistics of layer inputs, against the definitions written out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.calibration import (
    GRADIENTS,
    ActivationError,
    HiddenStates,
    LayerStatistics,
    Moment,
    Streams,
    Workers,
    channel_energies,
    collect,
    held_out_errors,
    stages,
)
from offline_compress.calibration.moments import InputMoments
from offline_compress.factors import LowRankFactors
from offline_compress.methods import SvdLlm
from offline_compress.methods.svd_llm import output_form
from offline_compress.planning import layers_of
from offline_compress.reference import load
from vllm_svd.errors import SvdError

ROOT = Path(__file__).parents[2]
EVERY = frozenset(get_args(Moment)) - GRADIENTS
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(directory):
    """The whole model at once, in plain transformers."""
    return load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def network(directory, network_of):
    return network_of(directory)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 4096, (5, 24), generator=torch.Generator().manual_seed(3))


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


def widths_of(network, index):
    """The input sites of one block, and the number of their channels."""
    observed = network.source.family.input_sites(network.config)
    shapes = layers_of(network.source)[index].shapes
    return {observed[path]: columns for path, (_, columns) in shapes.items()}


@torch.no_grad()
def advanced(network, streams, index):
    """The streams before the block of this index."""
    for earlier in range(index):
        block = network.block(earlier)
        for rows in streams.every():
            for stream in (streams.dense, streams.compressed):
                stream.write(rows, network.forward(earlier, block, stream.read(rows, CPU)))
    return streams


def collected(network, streams, index, needs, compressed=None):
    dense = network.block(index)
    widths = widths_of(network, index)
    return collect(network, index, dense, compressed or dense, streams, widths, needs)


def assert_near(found, expected):
    """Of fp32 activations: the order of their sums moves the last bits."""
    scale = float(expected.abs().max())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_every_block_gets_the_mask_of_its_own_attention(
    noisy_checkpoint, network_of, windows, tmp_path
):
    """Qwen2 may slide in its upper layers alone."""
    directory = shutil.copytree(noisy_checkpoint("qwen2"), tmp_path / "mixed")
    config = json.loads((directory / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (directory / "config.json").write_text(json.dumps(config))
    network, model = network_of(directory), load(directory, "cpu", torch.float32)
    hidden = network.embed(windows)
    for index in (0, 1):
        hidden = network.forward(index, network.block(index), hidden)
    expected = model(windows).logits
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(network.logits(hidden), expected, rtol=0, atol=atol)
    full = load(noisy_checkpoint("qwen2"), "cpu", torch.float32)(windows).logits
    assert not torch.allclose(full, expected, rtol=0, atol=1e3 * atol)


def test_statistics_are_the_moments_of_every_input(network, model, windows, streams_of):
    observed = network.source.family.input_sites(network.config)
    for index, layer in enumerate(layers_of(network.source)):
        streams = advanced(network, streams_of(network, windows), index)
        found = collected(network, streams, index, EVERY)
        for path in layer.shapes:  # the layers that share a site read the same input
            x, statistics = inputs_of(model, path, windows), found[observed[path]]
            assert statistics.tokens == len(x)
            assert_near(statistics.gram, x.T @ x / len(x))
            assert_near(statistics.mean, x.mean(0))
            assert_near(statistics.mean_abs, x.abs().mean(0))
            assert_near(statistics.max_abs, x.abs().amax(0))
            assert torch.equal(statistics.gram, statistics.gram.T)
            # nothing is compressed yet
            assert torch.equal(statistics.shifted_gram, statistics.gram)
            assert torch.equal(statistics.shifted_mean, statistics.mean)
            assert not statistics.shift.any()


@torch.no_grad()
def input_of(network, block, path, stream):
    """The input [tokens, n] of one layer of the first block, in fp64."""
    seen = []
    hook = block.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network.forward(0, block, stream.read(slice(0, len(stream)), CPU))
    hook.remove()
    return seen[0].flatten(0, -2).double()


def test_shifted_moments_are_those_of_the_compressed_model(network, windows, streams_of):
    """Whose hidden states before the block differ, and whose block does."""
    streams = streams_of(network, windows)
    generator = torch.Generator().manual_seed(0)
    for rows in streams.every():
        hidden = streams.dense.read(rows, CPU)
        streams.compressed.write(
            rows, hidden + 0.1 * torch.randn(hidden.shape, generator=generator)
        )
    compressed = network.block(0)
    compressed.self_attn.v_proj.weight.mul_(0.9)
    found = collected(network, streams, 0, EVERY, compressed)
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        x = input_of(network, network.block(0), path, streams.dense)
        there = input_of(network, compressed, path, streams.compressed)
        statistics = found[f"model.layers.0.{path}"]
        assert_near(statistics.gram, x.T @ x / len(x))
        assert_near(statistics.shifted_mean, there.mean(0))
        assert_near(statistics.shifted_gram, there.T @ there / len(x))
        assert_near(statistics.shift, (x - there).T @ there / len(x))
        assert float(statistics.shift.norm()) > 1e-2 * float(statistics.gram.norm())


@given(moved=st.integers(1, 9))
def test_tokens_of_an_expert_that_are_not_the_same_ones_are_not_subtracted(moved):
    """Routers of the two models may send it other tokens, and another number of them."""
    x, there = torch.randn(7, 4), torch.randn(moved, 4)
    moments = InputMoments(4, CPU, EVERY, paired=False)
    moments.add(x, there)
    moments.add(torch.empty(0, 4), there)
    found = moments.statistics("expert", Workers())
    assert found.tokens == 7
    assert_near(found.gram, x.double().T @ x.double() / 7)
    assert_near(found.shifted_gram, there.double().T @ there.double() / moved)
    assert not found.shift.any()


def test_an_expert_without_tokens_has_moments_of_zero():
    moments = InputMoments(4, CPU, EVERY, paired=False)
    moments.add(torch.empty(0, 4), torch.empty(0, 4))
    found = moments.statistics("expert", Workers())
    assert found.tokens == 0
    for name in EVERY:
        assert not found.gathered(name).any()


def test_the_batch_does_not_change_the_statistics(network, windows, streams_of):
    path = "model.layers.0.self_attn.o_proj"
    one, all_at_once = (
        collected(network, streams_of(network, windows, batch=batch), 0, EVERY)[path]
        for batch in (1, 5)
    )
    for name in EVERY - {"shift"}:
        assert_near(one.gathered(name), all_at_once.gathered(name))


def test_nothing_is_learned_from_held_out_samples(network, windows, streams_of):
    path = "model.layers.0.self_attn.o_proj"
    part = collected(network, streams_of(network, windows, held_out=2), 0, EVERY)[path]
    alone = collected(network, streams_of(network, windows[:3]), 0, EVERY)[path]
    for name in EVERY:
        assert torch.equal(part.gathered(name), alone.gathered(name))


def test_only_what_a_method_needs_is_gathered(network, windows, streams_of, monkeypatch):
    path = "model.layers.0.mlp.down_proj"
    streams = streams_of(network, windows)
    both = collected(network, streams, 0, frozenset({"gram", "mean_abs"}))[path]
    compressed = network.block(0)
    compressed.forward = None  # never runs
    means = collected(network, streams, 0, frozenset({"mean_abs"}), compressed)[path]
    assert means.gram is None
    assert torch.equal(means.gathered("mean_abs"), both.mean_abs)
    with pytest.raises(LookupError, match="gathered no gram"):
        means.gathered("gram")
    monkeypatch.setattr(network, "forward", None)  # not even a pass
    nothing = collected(network, streams, 0, frozenset())
    assert nothing == dict.fromkeys(widths_of(network, 0), LayerStatistics())


def test_no_samples_are_refused(network, windows, streams_of):
    with pytest.raises(SvdError, match=r"holds no samples.*\n.*--samples"):
        collected(network, streams_of(network, windows, held_out=5), 0, EVERY)


class OneBlock:
    """A network of one block, a list of layers that all read the hidden states."""

    paths, device = ("block",), CPU

    def forward(self, _index, block, hidden):
        for linear in block:
            linear(hidden)


def streams_over(hidden, batch):
    """The same hidden states [samples, context, channels] in both streams, all for calibration."""
    states = HiddenStates(tuple(hidden.shape), hidden.dtype, Path(), "unused")
    states.write(slice(None), hidden)
    return Streams(states, states, len(hidden), batch, Workers())


def outliers(dtype, channels=96, tokens=4096):
    """Channels of unequal scale around a common offset, the first with values of 1e4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator) * torch.logspace(-3, 0, channels)
    x[:, 0] *= 1e7
    return (x + 30 * torch.randn(channels, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_of_outliers_costs_svd_llm_nothing_in_its_tall_form(dtype):
    """Against the optimum, which the other form finds from the exact Gram."""
    x = outliers(dtype)
    block = torch.nn.ModuleList([torch.nn.Linear(96, 1, bias=False, dtype=dtype)])
    exact = x.double()
    gram = exact.T @ exact / len(x)
    streams, needs = streams_over(x.view(-1, 64, 96), 4), frozenset({"gram"})
    found = collect(OneBlock(), 0, block, block, streams, {"block.0": 96}, needs)["block.0"]
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
from tests.unit.test_calibration import OneBlock, collect, streams_over

def status(field):
    rows = open("/proc/self/status").read().splitlines()
    return int(next(row for row in rows if row.startswith(field)).split()[1]) * 1024

torch.set_num_threads(1)
block = torch.nn.ModuleList(torch.nn.Linear(1500, 1, bias=False) for _ in range(8))
streams, needs = streams_over(torch.randn(4, 16, 1500), 2), frozenset({"gram"})
collect(OneBlock(), 0, block, block, streams, {"block.0": 1500}, needs)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = status("VmRSS")
widths = {f"block.{i}": 1500 for i in range(8)}
found = collect(OneBlock(), 0, block, block, streams, widths, needs)
print((status("VmHWM") - before) / sum(one.gram.nbytes for one in found.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.4


@given(st.integers(0, 5))
def test_stages_hold_every_site_in_the_order_of_execution(experts):
    attention = ["layer.self_attn.q_proj", "layer.self_attn.o_proj"]
    mlps = [f"layer.mlp.experts.{e}" for e in range(experts)] or ["layer.mlp"]
    sites = attention + [f"{mlp}.{leaf}" for mlp in mlps for leaf in ("gate_proj", "down_proj")]
    found = stages(sites)
    assert found == [
        *([site] for site in attention),
        [f"{mlp}.gate_proj" for mlp in mlps],
        [f"{mlp}.down_proj" for mlp in mlps],
    ]
    assert stages(sites[1:2]) == [attention[1:]]


def test_no_hook_stays(network, windows, streams_of):
    block, streams = network.block(0), streams_of(network, windows)
    sites = widths_of(network, 0)
    collect(network, 0, block, block, streams, sites, EVERY)
    held_out_errors(network, 0, block, streams, {})
    channel_energies(network, 0, block, streams, ["self_attn.q_proj"])
    for module in block.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("needs", [{"mean_abs"}, {"gram"}, {"shifted_gram", "gram"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_layer_with_a_broken_input_is_named(
    noisy_checkpoint, network_of, streams_of, windows, value, needs
):
    network = network_of(noisy_checkpoint("qwen3"))
    block = network.block(1)
    block.mlp.up_proj.weight[3, 5] = value
    streams, widths = streams_of(network, windows), widths_of(network, 1)
    with pytest.raises(ActivationError, match=r"input of model\.layers\.1\.mlp\.down_proj is NaN"):
        collect(network, 1, block, block, streams, widths, frozenset(needs))


@torch.no_grad()
def test_the_measured_error_is_that_of_the_outputs_on_held_out_samples(
    network, model, windows, streams_of
):
    """The bias is no part of it, a correction of the approximation is."""
    streams = advanced(network, streams_of(network, windows, held_out=2), 1)
    errors, approximations = {}, {}
    paths = ("self_attn.v_proj", "self_attn.o_proj", "mlp.experts.1.down_proj", "mlp.gate_proj")
    for index, name in enumerate(paths):
        path = f"model.layers.1.{name}"
        if path not in layers_of(network.source)[1].shapes:
            continue
        weight = model.get_submodule(path).weight.detach()
        generator = torch.Generator().manual_seed(index)
        basis, _ = torch.linalg.qr(torch.randn(len(weight), 9, generator=generator))
        correction = torch.randn(len(weight), generator=generator)
        factors = LowRankFactors(A=basis.T @ weight, B=basis, correction=correction)
        x = inputs_of(model, path, windows[3:])
        exact = x @ weight.double().T
        lost = exact - x @ factors.dense().T - correction.double()
        errors[path] = float(lost.square().sum() / exact.square().sum())
        approximations[path] = factors.apply
    found = held_out_errors(network, 1, network.block(1), streams, approximations)
    assert found == pytest.approx(errors, rel=1e-4)


@torch.no_grad()
def test_channel_energies_are_those_that_rope_receives(network, model, windows, streams_of):
    family = network.source.family
    modules = [family.query_output, family.key_output]
    streams = advanced(network, streams_of(network, windows), 1)
    found = channel_energies(network, 1, network.block(1), streams, modules)
    for name, energy in zip(modules, found, strict=True):
        seen = []
        hook = model.get_submodule(f"model.layers.1.{name}").register_forward_hook(
            lambda _m, _x, y, seen=seen: seen.append(y.double())
        )
        model(windows)
        hook.remove()
        y = seen[0].reshape(windows.numel(), -1, network.head_dim)
        assert_near(energy, y.square().mean(0))
