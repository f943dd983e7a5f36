"""The sweep: every block is compressed on what the blocks before it give."""

import copy

import pytest
import torch
from runs import recipe_for, with_weights

from offline_compress import reference
from offline_compress.checkpoint import CacheError, MatrixError
from offline_compress.factors import (
    CodebookFactors,
    DeltaFactors,
    LowRankFactors,
    LowRankInt8Factors,
    ReducedFactors,
)
from offline_compress.families import family_of
from offline_compress.kv import KVBases
from offline_compress.planning import layers_of, plan
from offline_compress.progress import silent
from offline_compress.sweep import LayerResult, NumericalError, Sweep
from offline_compress.workspace import Workspace
from vllm_svd.format import Delta, KVProjection

UPDATED = {"name": "svd_llm", "update": True}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3_moe"])
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def windows():
    """Of which the last two are held out."""
    return torch.randint(0, 4096, (8, 32), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def swept(directory, network_of, streams_of, windows, tmp_path_factory):
    """What a method makes of every block."""

    def sweep(method):
        network = network_of(directory)
        recipe = recipe_for("text", method, context=32)
        streams = streams_of(network, windows, held_out=2, batch=4)
        layers, ranks = layers_of(network.source), plan(recipe, network.source)
        work = Workspace(tmp_path_factory.mktemp("work"))
        run = Sweep(network, recipe.weights.method, ranks, layers, streams, work)
        return list(run.run(silent))

    return sweep


@torch.no_grad()
def gram_of(model, path, windows):
    """E[x x^T] of the inputs of a linear layer."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    model(windows)
    hook.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


def test_truncation_is_told_of_the_dense_model_alone(directory, swept, windows):
    model = reference.load(directory, "cpu", torch.float32)
    for result in swept("svd_llm"):
        for path, factors in result.factors.items():
            weight = model.get_submodule(path).weight.detach()
            seen, unseen = (gram_of(model, path, part) for part in (windows[:6], windows[6:]))
            error = result.errors[path]
            assert error.predicted == pytest.approx(factors.output_error(weight, seen), rel=1e-4)
            assert error.held_out == pytest.approx(factors.output_error(weight, unseen), rel=1e-4)


def orthogonality(factors, weight, gram):
    """How much of the lost output goes with the latent: E[(W - B A) x (A x)^T], relative."""
    latent = gram @ factors.A.double().T
    lost = (weight - factors.dense()) @ latent
    return float(lost.norm() / (weight @ latent).norm())


def test_an_update_is_told_of_the_model_compressed_so_far(directory, swept, windows):
    """Its B is least squares on x', so what it loses is orthogonal to the latent of x'."""
    dense = reference.load(directory, "cpu", torch.float32)
    model, family = copy.deepcopy(dense), family_of(dense.config)
    observed, calibration = family.input_sites(dense.config), windows[:6]
    for index, result in enumerate(swept(UPDATED)):
        stage = {path: observed[path].rpartition(".")[2] for path in result.factors}
        for leaf in dict.fromkeys(stage.values()):  # what reads one input is compressed at once
            paths = [path for path in stage if stage[path] == leaf]
            for path in paths:
                factors, weight = result.factors[path], dense.get_submodule(path).weight.detach()
                gram = gram_of(model, path, calibration)
                assert orthogonality(factors, weight.double(), gram) < 1e-4
                if (index, leaf) != (0, "q_proj"):  # of the dense model's inputs it is not
                    gram = gram_of(dense, path, calibration)
                    assert orthogonality(factors, weight.double(), gram) > 1e-3
            for path in paths:
                reference.install_factors(model, path, result.factors[path])
        layer = f"model.layers.{index}"
        path = f"{layer}.{family.attention}"
        reference.install_kv(model.get_submodule(layer), family, path, result.bases)


def test_results_survive_their_record(tmp_path):
    generator = torch.Generator().manual_seed(8)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    low = LowRankFactors(A=randn(2, 6), B=randn(8, 2), correction=randn(8))
    delta = Delta(out_features=8, in_features=6, rank=2, kept_u=5, kept_v=4, bits=8)
    counts = {"U": torch.tensor([3, 2]), "V": torch.tensor([2, 2])}
    factors = {
        "l.a": low.to(torch.bfloat16),
        "l.b": LowRankInt8Factors.quantize(randn(2, 6), randn(8, 2), a_tail=1, b_tail=3),
        "l.c": CodebookFactors(
            torch.randint(0, 9, (8, 1), generator=generator, dtype=torch.int32),
            torch.randint(-9, 9, (1, 1, 16, 2), generator=generator, dtype=torch.int8),
            randn(1, 1),
            *(6, 8, 6),
        ),
        "l.d": ReducedFactors.of(randn(3, 6), (8, 6), rows=torch.tensor([0, 3, 7])),
        "l.e": DeltaFactors.pack(delta, {"U": randn(2, 8), "V": randn(2, 6)}, counts),
    }
    projection = KVProjection(mode="post", num_kv_heads=2, head_dim=8, k_rank=3, v_rank=5)
    bases = KVBases(projection, *(randn(*s.shape) for s in projection.tensors("").values()))
    errors = {path: MatrixError(predicted=0.1, held_out=1 / 3, damping=1e-12) for path in factors}
    made = LayerResult(factors, errors, bases, CacheError(k_error=0.2, v_error=1e-9))
    work = Workspace(tmp_path)
    for name, result in (("full", made), ("empty", LayerResult())):
        result.save(work, name)
        found = LayerResult.load(work, name)
        assert (found.errors, found.cache_error) == (result.errors, result.cache_error)
        assert found.factors.keys() == result.factors.keys()
        for path, factor in result.factors.items():
            assert found.factors[path].config() == factor.config()
            stored, again = factor.tensors(path), found.factors[path].tensors(path)
            assert stored.keys() == again.keys()
            assert all(torch.equal(stored[part], again[part]) for part in stored)
    again = LayerResult.load(work, "full").bases
    assert again.config == projection
    for part, tensor in bases.tensors("kv").items():
        assert torch.equal(again.tensors("kv")[part], tensor)
    assert LayerResult.load(work, "absent") is None


def test_factors_that_their_dtype_cannot_hold_are_named(
    noisy_checkpoint, network_of, streams_of, windows, tmp_path
):
    """Every weight fits in half precision; the norm of a column of them does not."""

    def enlarge(held):
        for name, tensor in held.items():
            held[name] = tensor.half()
        held["model.layers.1.mlp.down_proj.weight"].fill_(3e4)

    changed = with_weights(noisy_checkpoint("llama"), tmp_path / "model", enlarge)
    config = changed / "config.json"
    config.write_text(config.read_text().replace("float32", "float16"))
    network = network_of(changed)
    recipe = recipe_for("text", "svd", context=32)
    streams = streams_of(network, windows, held_out=2)
    ranks = plan(recipe, network.source)
    work = Workspace(tmp_path)
    run = Sweep(network, recipe.weights.method, ranks, layers_of(network.source), streams, work)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj\.A is not finite in F16"):
        list(run.run(silent))
