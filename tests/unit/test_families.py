"""The unfused model has the tensors of the checkpoint and computes what transformers does."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from offline_compress.families import (
    Experts,
    family_of,
    fill_computed,
    layer_paths,
    respect_soft_caps,
    unfuse,
)

FAMILIES = ["llama", "mistral", "gemma2", "qwen2", "qwen3", "qwen3_moe"]
TOKENS = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(0))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def skeleton(config):
    """The unfused model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    unfuse(model, family_of(config))
    respect_soft_caps(model)
    return model


def stored(directory):
    """Every tensor on disk, and the head where it is the embedding."""
    tensors = load_file(directory / "model.safetensors")
    return {HEAD: tensors[EMBEDDING]} | tensors


def from_disk(directory):
    """The stored tensors in the unfused model."""
    model = skeleton(AutoConfig.from_pretrained(directory))
    fill_computed(model)
    model.load_state_dict(stored(directory), strict=True, assign=True)
    return model.eval()


def from_transformers(directory, dtype=torch.float32):
    capped = hasattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping")
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        experts_implementation="eager",
        attn_implementation="eager" if capped else "sdpa",
    )


def linears(model):
    """Every linear layer but the head, by path."""
    modules = model.named_modules()
    return {path: m for path, m in modules if isinstance(m, nn.Linear) and path != "lm_head"}


@torch.inference_mode()
def reads(model):
    """The input of every linear layer that is called, by path, in execution order."""
    inputs = {}
    for path, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda _, x, path=path: inputs.update({path: x[0]}))
    model(TOKENS)
    return inputs


def assert_as_exact(given, plain, exact):
    """At most twice the rounding error of the plain expression in the same dtype."""
    error, noise = ((x.double() - exact).square().mean().sqrt() for x in (given, plain))
    assert error <= 2 * noise, (error, noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_on_disk(tiny_checkpoint, family):
    directory = tiny_checkpoint(family)
    state = skeleton(AutoConfig.from_pretrained(directory)).state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    on_disk = {name: tensor.shape for name, tensor in stored(directory).items()}
    assert {name: tensor.shape for name, tensor in state.items()} == on_disk


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_stored_tensors_reproduce_the_logits(tiny_checkpoint, family):
    directory = tiny_checkpoint(family)
    exact = from_transformers(directory, torch.float64)(TOKENS).logits
    plain = from_transformers(directory)(TOKENS).logits
    assert_as_exact(from_disk(directory)(TOKENS).logits, plain, exact)


def test_unfused_weights_are_copies_of_those_on_disk(tiny_checkpoint):
    directory = tiny_checkpoint("qwen3_moe")
    model = from_transformers(directory)
    unfuse(model, family_of(model.config))
    before = dict(model.named_modules())
    unfuse(model, family_of(model.config))
    assert dict(model.named_modules()) == before
    for name, tensor in stored(directory).items():
        found = model.state_dict()[name]
        assert torch.equal(found, tensor)
        assert found.untyped_storage().nbytes() == found.nbytes  # keeps no fused tensor alive


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_and_sites_are_those_of_a_forward_pass(tiny_checkpoint, family):
    model = from_disk(tiny_checkpoint(family))
    described = family_of(model.config)
    inputs = reads(model)
    assert list(inputs) == list(described.linear_paths(model.config))
    first = {}
    observed = {path: first.setdefault(id(x), path) for path, x in inputs.items()}
    assert described.input_sites(model.config) == observed
    for layer in layer_paths(model.config):
        attention = model.get_submodule(f"{layer}.{described.attention}")
        assert hasattr(attention, "q_norm") == described.qk_norm


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("dense", [None, [1], [0, 1, 2, 3]])
def test_layers_with_and_without_experts(experts, step, dense):
    config = Qwen3MoeConfig(
        num_hidden_layers=4,
        num_experts=experts,
        decoder_sparse_step=step,
        mlp_only_layers=dense,
        architectures=["Qwen3MoeForCausalLM"],
    )
    assert list(family_of(config).linear_paths(config)) == list(linears(skeleton(config)))


def fused_experts(dtype, experts=5):
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=48, moe_intermediate_size=24)
    config._experts_implementation = "eager"
    fused = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(1)
    for weight in fused.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    return fused.to(dtype)


def routed(tokens, k, allowed):
    """Inputs and k of the allowed experts, with weights, for every token."""
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(tokens, len(allowed), generator=generator).argsort(-1)[:, :k]
    weights = torch.rand(tokens, k, generator=generator)
    return torch.randn(tokens, 48, generator=generator), torch.tensor(allowed)[order], weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "k", "allowed"),
    [(64, 2, [0, 1, 3, 4]), (64, 5, [0, 1, 2, 3, 4]), (9, 1, [4]), (1, 2, [0, 3]), (0, 2, [0, 1])],
)
@torch.inference_mode()
def test_experts_equal_the_fused_module(dtype, tokens, k, allowed):
    fused = fused_experts(dtype)
    x, index, weights = routed(tokens, k, allowed)
    x, weights = x.to(dtype), weights.to(dtype)
    given, plain = Experts.of(fused)(x, index, weights), fused(x, index, weights)
    assert (given.shape, given.dtype) == (plain.shape, plain.dtype)
    if tokens:
        exact = copy.deepcopy(fused).double()(x.double(), index, weights.double())
        assert_as_exact(given, plain, exact)


def test_gradients_equal_those_of_the_fused_module():
    """Up to the order of sums over channels and tokens, in fp64."""
    fused = fused_experts(torch.float64)
    experts = Experts.of(fused)
    x, index, weights = routed(64, 2, [0, 1, 3, 4])
    for module in (experts, fused):
        module(x.double(), index, weights.double()).square().sum().backward()
    bound = (48 + 24 + 64) * torch.finfo(torch.float64).eps
    for number, expert in enumerate(experts):
        gate, up = fused.gate_up_proj.grad[number].chunk(2)
        for name, plain in (("gate", gate), ("up", up), ("down", fused.down_proj.grad[number])):
            given = expert.get_submodule(f"{name}_proj").weight.grad
            if number == 2:  # no token: never called
                assert given is None and not plain.any()
            else:
                assert (given - plain).norm() <= bound * plain.norm()


def test_an_expert_without_tokens_is_never_called(tiny_checkpoint, tmp_path):
    """The router reads a channel that is positive for every token against expert 2."""
    model = from_transformers(tiny_checkpoint("qwen3_moe"))
    model.model.embed_tokens.weight.data[:, 0] = 0.2
    model.model.layers[1].mlp.gate.weight.data[:, 0] = torch.tensor([0.0, 0.0, -10.0, 0.0])
    model.save_pretrained(tmp_path)
    starved = from_disk(tmp_path)
    paths = family_of(model.config).linear_paths(model.config)
    with torch.inference_mode():
        exact = from_transformers(tmp_path, torch.float64)(TOKENS).logits
        assert_as_exact(starved(TOKENS).logits, model(TOKENS).logits, exact)
    assert list(reads(starved)) == [path for path in paths if ".experts.2." not in path]
