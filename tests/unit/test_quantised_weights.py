"""Models whose weights others quantised: read as what they stand for, kept as they are stored."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from quantised_models import METHODS, quantised, weights_of
from reference_models import assert_same_logits, logits
from runs import tensors_of, with_weights

from offline_compress import reference
from offline_compress.weights import SourceError, open_source
from vllm_svd.format import read, verify

NAMES = sorted(METHODS)


@pytest.fixture(scope="module")
def quantised_checkpoint(tiny_checkpoint, tmp_path_factory):
    made = {}

    def make(name, family="llama"):
        if (name, family) not in made:
            out = tmp_path_factory.mktemp("quantised") / name
            made[name, family] = quantised(tiny_checkpoint(family), out, name)
        return made[name, family]

    return make


def with_config(directory, out, **changes):
    """A copy with another quantization_config."""
    shutil.copytree(directory, out)
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_read_as_what_it_stands_for(quantised_checkpoint, name):
    directory = quantised_checkpoint(name)
    source = open_source(str(directory), quantised=True)
    for tensor, weight in weights_of(directory).items():
        # One rounding of a scale that was stored in fp16 or fp32, and one product.
        assert torch.allclose(source.read(tensor), weight, rtol=1e-6, atol=0), tensor
    assert source.read("model.norm.weight").shape == (64,)


def test_packed_integers_as_the_library_unpacks_them(quantised_checkpoint):
    for name in ("packed", "packed_zeros"):
        directory = quantised_checkpoint(name)
        source = open_source(str(directory), quantised=True)
        config = source.quantised.config["config_groups"]["group_0"]
        path = "model.layers.1.mlp.down_proj"
        stored = tensors_of(directory)
        parts = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{path}.")}
        unpacked = PackedQuantizationCompressor.decompress(parts, QuantizationScheme(**config))
        # The library multiplies in the dtype of the scales.
        rounding = torch.finfo(parts["weight_scale"].dtype).eps
        weight = unpacked["weight"].float()
        assert torch.allclose(source.read(f"{path}.weight"), weight, rtol=rounding, atol=0)


def as_bytes(tensor):
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_only_projections_are_added(
    quantised_checkpoint, name, invoke, recipe, short_text, tmp_path
):
    model, out = quantised_checkpoint(name), tmp_path / "out"
    arguments = ("--recipe", recipe, "--text", short_text, "--kv-only", "--kv-kept", 0.5)
    code, output, errors = invoke("run", model, out, *arguments)
    assert code == 0, errors
    before, after = tensors_of(model), tensors_of(out)
    config = verify(out)
    assert after.keys() - before.keys() == config.tensors().keys()
    for tensor, value in before.items():
        assert torch.equal(as_bytes(after[tensor]), as_bytes(value)), tensor
    assert config.weights == json.loads((model / "config.json").read_text())["quantization_config"]
    assert not config.modules
    code, output, errors = invoke("inspect", out, "--json")
    assert code == 0, errors
    totals = json.loads(output)["plan"]["totals"]
    assert totals["checkpoint_bytes_dense"] == sum(t.nbytes for t in before.values())
    assert totals["checkpoint_bytes"] == sum(t.nbytes for t in after.values())


def test_what_was_written_computes_as_measured_and_restores(
    quantised_checkpoint, invoke, recipe, short_text, tmp_path
):
    """Every channel of one layer's cache kept is a change of basis, no more."""
    model, out, back = quantised_checkpoint("awq"), tmp_path / "out", tmp_path / "back"
    full = "kv: {kept: null, layers: {0: {k_rank: 32, v_rank: 32}}}\n"
    recipe.write_text(recipe.read_text() + full)
    arguments = ("--recipe", recipe, "--text", short_text, "--kv-only")
    code, _, errors = invoke("run", model, out, *arguments)
    assert code == 0, errors
    assert read(out).kv
    dense = logits(reference.load(model, "cpu", torch.float32))
    assert_same_logits(logits(reference.load(out, "cpu", torch.float32)), dense)
    code, _, errors = invoke("restore", out, back)
    assert code == 0, errors
    raw = json.loads((back / "config.json").read_text())
    assert raw["quantization_config"] == read(out).weights
    assert torch.equal(logits(reference.load(back, "cpu", torch.float32)), dense)


def test_bases_are_those_of_the_dense_weights(
    quantised_checkpoint, tiny_checkpoint, invoke, recipe, short_text, tmp_path
):
    model = quantised_checkpoint("int8")
    plain = with_weights(
        tiny_checkpoint("llama"), tmp_path / "plain", lambda held: held.update(weights_of(model))
    )
    made = []
    for source, name in ((model, "a"), (plain, "b")):
        arguments = ("--recipe", recipe, "--text", short_text, "--kv-only", "--kv-kept", 0.5)
        code, _, errors = invoke("run", source, tmp_path / name, *arguments)
        assert code == 0, errors
        made.append({n: t for n, t in tensors_of(tmp_path / name).items() if ".attn." in n})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


Q_PROJ = "model.layers.0.self_attn.q_proj"


def put(part, tensor):
    """A change of one part of a layer; None takes it away."""

    def change(held):
        held.pop(f"{Q_PROJ}.{part}", None)
        if tensor is not None:
            held[f"{Q_PROJ}.{part}"] = tensor

    return change


@pytest.mark.parametrize(
    ("name", "part", "tensor", "message"),
    [
        ("gptq", "scales", None, r"scales is missing"),
        ("gptq", "scales", torch.zeros(0, 128), r"has 0 groups for 64 columns|qzeros is"),
        ("gptq", "scales", torch.tensor(1.0), r"scales is F32 \[\]; 2 dimensions"),
        ("gptq", "qweight", torch.zeros(8, 128), r"qweight is F32 \[8, 128\]; I32 was"),
        ("awq", "qweight", torch.zeros(3, 3).int(), r"qweight is I32 \[3, 3\]; \[64, 16\] was"),
        ("packed", "weight_scale", torch.zeros(3, 2), r"F32 \[3, 2\]; \[128, 2\] was expected"),
        ("packed", "weight_packed", torch.zeros(128, 3).int(), r"2, 4, 8 bits a weight"),
        ("int8", "weight_scale", torch.zeros(5, 1), r"has 5 x 1 scales"),
        ("int8", "input_scale", torch.zeros(1).bool(), r"input_scale is BOOL; BF16, F16"),
        ("fp8_blocks", "weight_scale_inv", torch.zeros(2, 2), r"one for every 48 x 48"),
    ],
)
def test_parts_that_are_missing_or_misshapen_are_named(
    quantised_checkpoint, tmp_path, name, part, tensor, message
):
    model = with_weights(quantised_checkpoint(name), tmp_path / "model", put(part, tensor))
    with pytest.raises(SourceError, match=message):
        open_source(str(model), quantised=True)


def test_surplus_biases_must_be_zero(quantised_checkpoint, tmp_path):
    model = with_weights(
        quantised_checkpoint("gptq"), tmp_path / "model", put("bias", torch.ones(128))
    )
    with pytest.raises(SourceError, match="biases that are not zero"):
        open_source(str(model), quantised=True)


def test_groups_beyond_the_scales_are_refused_when_read(quantised_checkpoint, tmp_path):
    wild = put("g_idx", torch.full((64,), 7, dtype=torch.int32))
    model = with_weights(quantised_checkpoint("gptq"), tmp_path / "model", wild)
    source = open_source(str(model), quantised=True)
    with pytest.raises(SourceError, match="g_idx names groups beyond 2"):
        source.read(f"{Q_PROJ}.weight")


@pytest.mark.parametrize("block", [128, [128], ["a", "b"], [0, 0]])
def test_blocks_that_are_none_are_refused(quantised_checkpoint, tmp_path, block):
    model = with_config(
        quantised_checkpoint("fp8_blocks"), tmp_path / "model", weight_block_size=block
    )
    with pytest.raises(SourceError, match="two positive sizes were expected"):
        open_source(str(model), quantised=True)


def test_what_is_refused(quantised_checkpoint, refused, tmp_path_factory):
    """Weights to compress, methods nobody reads here, caches that are quantised too."""
    root, model = tmp_path_factory.mktemp("edited"), quantised_checkpoint("gptq")
    assert "--kv-only" in refused(source=model)
    other = with_config(model, root / "other", quant_method="exl2")
    assert "accepted beside K/V projections are gptq, awq" in refused("--kv-only", source=other)
    caches = with_config(
        quantised_checkpoint("int8"), root / "caches", kv_cache_scheme={"num_bits": 8}
    )
    turned = with_config(model, root / "turned", transform_config={"config_groups": {}})
    assert "with transforms" in refused("--kv-only", source=turned)
    assert "kv_cache_scheme" in refused("--kv-only", source=caches)
    assert "drop one of the two" in refused("--kv-only", "--kept", 0.5, source=model)
