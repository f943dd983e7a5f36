"""Gradient moments block by block, against autograd through the whole model."""

import pytest
import torch
from torch.nn import functional

from offline_compress.calibration.gradients import gradient_moments
from offline_compress.planning import layers_of
from offline_compress.reference import load
from vllm_svd.errors import SvdError

BOTH = frozenset({"fisher", "output_gram"})


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2", "qwen2", "qwen3_moe"])
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def network(directory, network_of):
    return network_of(directory)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 4096, (3, 20), generator=torch.Generator().manual_seed(5))


def moments_of(network, windows, directory, needs=BOTH, **options):
    """What is kept, by layer, and in which order."""
    found, layers = {}, layers_of(network.source)
    gradient_moments(
        network,
        windows,
        {index: layer.shapes for index, layer in enumerate(layers)},
        needs,
        found.__setitem__,
        directory,
        **{"batch": 2} | options,
    )
    return found


def by_autograd(directory, windows, paths):
    """(fisher, output_gram) of every matrix by its definition, sample by sample."""
    model = load(directory, "cpu", torch.float32)
    squares, outers, tokens = (dict.fromkeys(paths, 0.0) for _ in range(3))
    outputs = {}

    def keep(path):
        def hook(_module, _inputs, output):
            output.retain_grad()
            outputs[path] = output

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_hook(keep(path))
    for window in windows:
        outputs.clear()
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        for path, output in outputs.items():
            g = output.grad.flatten(0, -2).double()
            outers[path] += g.T @ g
            tokens[path] += len(g)
            squares[path] += model.get_submodule(path).weight.grad.double().square().sum(0)
    return {
        path: (squares[path] / len(windows), outers[path] / max(tokens[path], 1)) for path in paths
    }


def assert_near(found, expected):
    """Of fp32 gradients through two blocks."""
    scale = float(torch.as_tensor(expected).abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def test_moments_are_those_of_the_whole_model(network, directory, windows, tmp_path):
    seen = []
    found = moments_of(network, windows, tmp_path, progress=lambda *step: seen.append(step))
    assert list(found) == [1, 0]  # the last block first
    assert seen == [("forward", 1, 2), ("forward", 2, 2), ("gradients", 1, 2), ("gradients", 2, 2)]
    paths = [path for layer in layers_of(network.source) for path in layer.shapes]
    expected = by_autograd(directory, windows, paths)
    assert [path for index in (0, 1) for path in found[index]] == paths
    for layer in found.values():
        for path, moments in layer.items():
            fisher, gram = expected[path]
            assert_near(moments["fisher"], fisher)
            assert_near(moments["output_gram"], gram)
            assert torch.equal(moments["output_gram"], moments["output_gram"].T)


def test_only_what_is_needed_is_kept_whatever_the_batch_and_the_memory(network, windows, tmp_path):
    """Borders in files, deleted at the end; the batch moves rounding alone."""
    whole = moments_of(network, windows, tmp_path)
    for moment in BOTH:
        part = moments_of(network, windows, tmp_path, frozenset({moment}), batch=3, limit=0)
        assert not list(tmp_path.iterdir())
        for index, layer in part.items():
            for path, moments in layer.items():
                assert moments.keys() == {moment}
                assert_near(moments[moment], whole[index][path][moment])


def test_a_gradient_that_is_not_finite_names_its_layer(
    noisy_checkpoint, network_of, windows, tmp_path
):
    network = network_of(noisy_checkpoint("llama"))
    network.logits(network.embed(windows[:1]))  # the head is here
    network._model.lm_head.weight[:, 3] = float("inf")
    with pytest.raises(SvdError, match=r"the output of model\.layers\.1\.[a-z_.]+ is not finite"):
        moments_of(network, windows, tmp_path)
