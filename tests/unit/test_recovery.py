"""Fine-tuned factors: each side in its turn, by the gradient of the whole model's loss."""

import pytest
import torch
from runs import IDLE, recipe_for, with_idle_expert, with_weights
from torch.nn.functional import cross_entropy

from offline_compress import kv, recovery, reference
from offline_compress.calibration import LayerStatistics, Network, Workers
from offline_compress.checkpoint import inspect
from offline_compress.evaluation import perplexity
from offline_compress.methods import Recovery, Svd
from offline_compress.pipeline import compress
from offline_compress.preflight import prepare_run
from offline_compress.progress import silent
from offline_compress.weights import open_source
from offline_compress.workspace import Workspace
from vllm_svd.errors import SvdError

CPU = torch.device("cpu")
SIDES = ("A", "B")


def truncated(source, rank=8):
    """Every matrix of a model at a rank, in fp32."""
    return {
        path: Svd()
        .factorize(source.read(f"{path}.weight"), LayerStatistics(), rank)
        .factors.to(torch.float32)
        for path in source.linears()
    }


class Case:
    """A model, its factors and a few windows."""

    def __init__(self, directory, work):
        self.directory, self.work = directory, Workspace(work)
        self.source = open_source(str(directory))
        self.factors = truncated(self.source)
        generator = torch.Generator().manual_seed(5)
        self.windows = torch.randint(0, 512, (4, 24), generator=generator)

    def recovered(self, steps, lr=1e-3, progress=silent, work=None, batch=2):
        network = Network(self.source, CPU, torch.float32)
        return recovery.recover(
            network,
            self.factors,
            self.windows,
            Recovery(steps=steps, lr=lr),
            batch=batch,
            seed=0,
            workers=Workers(),
            work=work or self.work,
            progress=progress,
        )

    def model(self, factors):
        model = reference.load(self.directory, CPU, torch.float32)
        for path, found in factors.items():
            reference.install_factors(model, path, found)
        return model

    @torch.no_grad()
    def loss(self, factors):
        logits = self.model(factors)(input_ids=self.windows).logits[:, :-1]
        return float(cross_entropy(logits.flatten(0, 1), self.windows[:, 1:].flatten()))


@pytest.fixture
def case(noisy_checkpoint, tmp_path):
    return Case(noisy_checkpoint("llama"), tmp_path)


def parts(factors, side):
    return {path: getattr(found, side) for path, found in factors.items()}


def same(one, other):
    return all(torch.equal(one[path], other[path]) for path in one)


def test_the_loss_of_the_windows_falls_and_ranks_stay(case):
    found = case.recovered(10)
    assert case.loss(found) < 0.99 * case.loss(case.factors)
    assert {path: f.config() for path, f in found.items()} == {
        path: f.config() for path, f in case.factors.items()
    }


def test_every_b_moves_first_and_then_every_a(case):
    between = {}

    def progress(stage, done, total):
        assert (stage, total) == ("recover", 6)
        if done == 4:  # the record of the third step is that of the first half
            tensors, steps = case.work.load("recovery")
            assert steps == 3
            between.update(tensors)

    found = case.recovered(3, progress=progress)
    half = {side: {p: between[f"{p}|{side}"] for p in case.factors} for side in SIDES}
    assert same(half["A"], parts(case.factors, "A"))
    assert same(half["B"], parts(found, "B"))
    for path in case.factors:
        assert not torch.equal(half["B"][path], case.factors[path].B)
        assert not torch.equal(half["A"][path], found[path].A)


def test_the_first_step_goes_along_the_gradient_of_the_mean_loss(case):
    """Adam's first step is lr g / (|g| + eps)."""
    model = case.model(case.factors)
    layers = {path: model.get_submodule(path) for path in case.factors}
    for layer in layers.values():
        layer.B.requires_grad_(True)
    logits = model(input_ids=case.windows).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), case.windows[:, 1:].flatten()).backward()
    found = case.recovered(1, lr=1e-3, batch=4)
    for path, layer in layers.items():
        step = (found[path].B - case.factors[path].B) / 1e-3
        gradient = layer.B.grad
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        expected = -gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(step[clear], expected[clear], rtol=0, atol=1e-3)


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("death", [2, 5, 8])
def test_a_killed_recovery_ends_bit_for_bit_the_same(case, tmp_path, monkeypatch, death):
    (tmp_path / "whole").mkdir()
    whole = case.recovered(4, work=Workspace(tmp_path / "whole"))
    monkeypatch.setattr(recovery, "_RECORDED", 1)
    done = []

    def progress(_stage, now, _total):
        done.append(now)
        if now == death and len(done) == death:
            raise Killed

    with pytest.raises(Killed):
        case.recovered(4, progress=progress)
    again = case.recovered(4, progress=progress)
    assert done == [*range(1, death + 1), *range(death, 9)]  # the step that died has no record
    for side in SIDES:
        assert same(parts(again, side), parts(whole, side))


def test_an_expert_without_tokens_stays_as_it_is(noisy_checkpoint, tmp_path):
    idle = with_idle_expert(noisy_checkpoint("qwen3_moe"), tmp_path / "idle")
    case = Case(idle, tmp_path)
    found = case.recovered(2)
    for path, factors in found.items():
        still = all(torch.equal(getattr(factors, s), getattr(case.factors[path], s)) for s in SIDES)
        assert still == path.startswith(IDLE)


def test_a_loss_that_is_not_finite_is_named(noisy_checkpoint, tmp_path):
    def spoil(held):
        held["model.norm.weight"][0] = torch.inf

    case = Case(with_weights(noisy_checkpoint("llama"), tmp_path / "spoilt", spoil), tmp_path)
    with pytest.raises(SvdError, match=r"not finite while it is fine-tuned\n.*recover\.lr"):
        case.recovered(1)


def test_a_run_stores_what_was_fine_tuned_and_projects_the_cache_behind_it(
    noisy_checkpoint, short_text, tmp_path, monkeypatch
):
    model, out = noisy_checkpoint("llama"), tmp_path / "out"
    recipes = {
        steps: recipe_for(
            short_text, {"name": "svd_llm", "recover": steps and {"steps": steps, "lr": 1e-3}}
        )
        for steps in (None, 8)
    }
    corpus = prepare_run(recipes[8], str(model), out).corpus
    stages = []
    plain = compress(recipes[None], str(model), tmp_path / "plain")
    projected, collect = [], kv.collect

    def watched(network, index, block, *rest):
        projected.append((index, block.self_attn.k_proj.weight.clone()))
        return collect(network, index, block, *rest)

    monkeypatch.setattr(kv, "collect", watched)
    measured = compress(recipes[8], str(model), out, lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["compress", "recover", "write"]
    assert inspect(out).plan.compressed == inspect(tmp_path / "plain").plan.compressed
    assert measured.caches.keys() == plain.caches.keys() != set()
    networks = {
        where: reference.load(tmp_path / where, "cpu", torch.float32) for where in ("plain", "out")
    }
    assert {index for index, _ in projected} == {0, 1}
    for index, weight in projected:  # what was fine-tuned, not what was truncated
        layer = networks["out"].model.layers[index]
        torch.testing.assert_close(layer.self_attn.k_proj.weight, weight, rtol=0, atol=0)
    found = perplexity(networks["out"], corpus.held_out, 64, 4, corpus.bos)
    assert found.perplexity == pytest.approx(measured.perplexity, rel=1e-6)
    calibrated = {
        where: perplexity(network, corpus.calibration.flatten(), 64, 4).perplexity
        for where, network in networks.items()
    }
    assert calibrated["out"] < calibrated["plain"]
    for path, error in measured.matrices.items():
        assert error.predicted == plain.matrices[path].predicted
        assert error.held_out != plain.matrices[path].held_out
