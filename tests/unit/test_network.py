"""A model one block at a time: the same numbers, with the weights of one block in memory."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from runs import recipe_for

from offline_compress.calibration import Network
from offline_compress.pipeline import compress
from offline_compress.reference import load
from offline_compress.weights import Source
from offline_compress.workspace import work_root

FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "qwen3", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def windows():
    """Longer than the window of 16 tokens that attention of Mistral and Gemma 2 slides."""
    return torch.randint(0, 4096, (3, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_the_hidden_states_behind_every_block_are_the_models(directory, network_of, windows):
    network, model = network_of(directory), load(directory, "cpu", torch.float32)
    whole = model(windows, output_hidden_states=True)
    hidden = network.embed(windows)
    assert torch.equal(hidden, whole.hidden_states[0])
    for index in range(len(network.paths)):
        block = network.block(index)
        behind = network.forward(index, block, hidden)
        alone = torch.cat([network.forward(index, block, row[None]) for row in hidden])
        for found in (behind, alone):  # of one batch, and of batches of one
            expected = whole.hidden_states[index + 1]
            if index + 1 == len(network.paths):  # transformers gives these behind the norm only
                expected, found = whole.logits, network.logits(found)
            atol = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        hidden = behind
    if model.config.model_type == "mistral":
        last = model(windows[:, -16:]).logits[:, -1]
        assert not torch.allclose(last, whole.logits[:, -1], rtol=0, atol=1e-2)


@torch.no_grad()
def test_every_tensor_is_read_once_and_a_block_leaves_when_it_is_dropped(
    directory, network_of, windows, monkeypatch
):
    network, reads, read = network_of(directory), Counter(), Source.read

    def counted(source, name):
        reads[name] += 1
        return read(source, name)

    monkeypatch.setattr(Source, "read", counted)
    hidden = network.embed(windows)
    assert list(reads) == ["model.embed_tokens.weight"]
    for index, path in enumerate(network.paths):
        before = set(reads)
        block = network.block(index)
        new = {name for name in network.source.shapes if name.startswith(f"{path}.")}
        assert set(reads) - before == new
        held = [weakref.ref(parameter) for parameter in block.parameters()]
        assert len(held) == len(new)
        hidden = network.forward(index, block, hidden)
        del block
        gc.collect()
        assert not any(parameter() is not None for parameter in held)
    for _ in range(2):  # embedding, norm and head stay
        network.embed(windows)
        network.logits(hidden)
    tied = network.config.tie_word_embeddings
    assert reads == Counter(network.source.shapes.keys()) + Counter(
        ["model.embed_tokens.weight"] if tied else []  # as the head
    )


def test_a_block_is_its_own(directory, network_of):
    network = network_of(directory)
    one, other = network.block(0), network.block(0)
    states = one.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    before = other.self_attn.config._attn_implementation
    one.self_attn.config._attn_implementation = "flex_attention"
    for block in (other, network.block(0)):
        assert all(parameter.any() for parameter in block.parameters())
        assert block.self_attn.config._attn_implementation == before
        assert not any(parameter.requires_grad for parameter in block.parameters())


def test_the_network_computes_in_the_dtype_it_is_told(noisy_checkpoint, network_of, windows):
    source = network_of(noisy_checkpoint("qwen3")).source
    network = Network(source, torch.device("cpu"), torch.bfloat16)
    hidden = network.forward(0, network.block(0), network.embed(windows))
    assert {hidden.dtype, network.logits(hidden).dtype} == {torch.bfloat16}
    assert network.rotary.inv_freq.dtype == torch.float32


def test_hidden_states_in_files_give_the_same_checkpoint(noisy_checkpoint, short_text, tmp_path):
    """Of a method that takes gradients: all its streams are spilled."""
    shards, files = [], set()

    def look(*_):
        files.update(path.name for path in work_root(tmp_path / "spilled").glob("*/*.hidden"))

    for name, gib in (("held", 1), ("spilled", 1e-9)):
        recipe = recipe_for(short_text, "gfwsvd", host_memory_gib=gib)
        compress(recipe, str(noisy_checkpoint("llama")), tmp_path / name, look)
        shards.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")})
    assert shards[0] == shards[1] != {}
    assert len(files) == 2 + 3  # both streams, and the borders of two blocks
    assert {path.name for path in tmp_path.iterdir()} == {"held", "spilled"}
