"""Perplexity: the protocol, token by token."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from offline_compress.evaluation import default_bos, fidelity, perplexity, tokenize_file
from offline_compress.reference import load
from vllm_svd.errors import SvdError


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    loaded = load(tiny_checkpoint("llama"), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return loaded


@pytest.fixture(scope="module")
def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, model.config.vocab_size, (100,), generator=generator)


def tokenizer(*, with_bos: bool) -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "<unk>": 1, "one": 2, "two": 3, "three": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@torch.no_grad()
def negative_log_likelihoods(model, window):
    """One forward pass per scored token."""
    losses = []
    for position in range(1, len(window)):
        logits = model(window[None, :position]).logits[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[window[position]]))
    return losses


def test_with_bos_every_token_of_the_text_is_scored(model, tokens):
    windows = [
        torch.cat((torch.tensor([1]), tokens[start : start + 31])) for start in range(0, 100, 31)
    ]
    losses = [loss for window in windows for loss in negative_log_likelihoods(model, window)]
    measured = perplexity(model, tokens, context=32, batch=2, bos=1)
    assert (measured.tokens, measured.windows, measured.context) == (100, 4, 32)
    assert measured.nll == pytest.approx(sum(losses) / 100, rel=1e-5)
    assert measured.perplexity == math.exp(measured.nll)
    assert (measured.stride, measured.bos, measured.dtype) == (31, True, "float32")


def test_without_bos_the_first_token_of_each_window_is_not_scored(model, tokens):
    windows = [tokens[start : start + 32] for start in range(0, 100, 32)]
    losses = [loss for window in windows for loss in negative_log_likelihoods(model, window)]
    measured = perplexity(model, tokens, context=32, batch=3)
    assert (measured.tokens, measured.windows) == (96, 4)
    assert (measured.stride, measured.bos) == (32, False)
    assert "32 tokens, the first unscored" in str(measured)
    assert measured.nll == pytest.approx(sum(losses) / 96, rel=1e-5)


def test_a_last_window_with_nothing_to_predict_is_dropped(model, tokens):
    measured = perplexity(model, tokens[:33], context=32, batch=1)
    assert (measured.tokens, measured.windows) == (31, 1)


@pytest.mark.parametrize("bos", [None, 1])
def test_batching_changes_nothing(model, tokens, bos):
    reported = []
    one = perplexity(model, tokens, 16, batch=1, bos=bos)
    many = perplexity(
        model, tokens, 16, 5, bos, progress=lambda _, done, total: reported.append((done, total))
    )
    assert many.nll == pytest.approx(one.nll, rel=1e-6)
    assert many.tokens == one.tokens
    assert reported[-1] == (one.windows, one.windows)


def test_a_model_that_knows_nothing_scores_its_vocabulary(tiny_checkpoint, tokens):
    model = load(tiny_checkpoint("qwen3"), "cpu", torch.float32)
    model.lm_head.weight.data.zero_()
    measured = perplexity(model, tokens % model.config.vocab_size, 32, 4, 0)
    assert measured.perplexity == pytest.approx(model.config.vocab_size, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "context", "batch"), [(0, 32, 1), (1, 32, 1), (50, 1, 1), (50, 32, 0)]
)
def test_nothing_to_score_is_refused(model, tokens, length, context, batch):
    with pytest.raises(SvdError, match="nothing to score"):
        perplexity(model, tokens[:length], context, batch)


def test_logits_that_are_not_finite_are_refused(tiny_checkpoint, tokens):
    model = load(tiny_checkpoint("qwen3"), "cpu", torch.float32)
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(SvdError, match="not finite"):
        perplexity(model, tokens % model.config.vocab_size, 32, 4)


def test_a_perplexity_beyond_fp64_is_refused(tiny_checkpoint, tokens):
    model = load(tiny_checkpoint("qwen3"), "cpu", torch.float32)
    model.lm_head.weight.data *= 1e6
    with pytest.raises(SvdError, match="not finite"):
        perplexity(model, tokens % model.config.vocab_size, 32, 4)


def test_a_context_beyond_the_positions_is_refused(model):
    positions = model.config.max_position_embeddings
    text = torch.full((2 * positions,), 3)
    assert perplexity(model, text[:positions], positions, 1).windows == 1
    with pytest.raises(SvdError, match=f"{positions + 1} tokens exceeds the model's {positions}"):
        perplexity(model, text, positions + 1, 1)


@pytest.fixture(scope="module")
def network(noisy_checkpoint, network_of):
    return network_of(noisy_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def windows(tokens):
    """Of which the last three are held out."""
    return tokens[:80].view(5, 16)


def noisy_streams(network, streams_of, windows, noise, batch=2):
    """Hidden states behind the last block, those of the compressed model with noise on top."""
    streams = streams_of(network, windows, held_out=3, batch=batch)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*windows.shape, network.config.hidden_size, generator=generator)
    streams.dense.write(slice(0, 5), hidden)
    other = hidden + noise * torch.randn(hidden.shape, generator=generator)
    streams.compressed.write(slice(0, 5), other)
    return streams, hidden[2:], other[2:]


@torch.no_grad()
def test_fidelity_is_the_definition_over_every_token_with_something_before_it(
    network, streams_of, windows
):
    streams, *hidden = noisy_streams(network, streams_of, windows, noise=0.5)
    found = fidelity(network, streams, windows[2:])
    dense, other = (network.logits(h)[:, :-1].double().log_softmax(-1) for h in hidden)
    targets = windows[2:, 1:, None]
    assert found.tokens == 3 * 15
    for measured, scores in ((found.perplexity_dense, dense), (found.perplexity, other)):
        expected = math.exp(-float(scores.gather(-1, targets).mean()))
        assert measured == pytest.approx(expected, rel=1e-6)
    divergence = (dense.exp() * (dense - other)).sum(-1).mean()
    assert found.kl == pytest.approx(float(divergence), rel=1e-5)
    assert found.top1 == float((dense.argmax(-1) == other.argmax(-1)).double().mean()) < 1
    again = fidelity(network, noisy_streams(network, streams_of, windows, 0.5, 1)[0], windows[2:])
    assert again.kl == pytest.approx(found.kl, rel=1e-6)


def test_a_model_is_faithful_to_itself(network, streams_of, windows):
    streams, *_ = noisy_streams(network, streams_of, windows, noise=0)
    found = fidelity(network, streams, windows[2:])
    assert (found.kl, found.top1, found.perplexity) == (0, 1, found.perplexity_dense)


def test_hidden_states_that_are_not_finite_are_refused(network, streams_of, windows):
    streams, _, other = noisy_streams(network, streams_of, windows, noise=0.1)
    other[1, 3] = float("nan")
    streams.compressed.write(slice(2, 5), other)
    with pytest.raises(SvdError, match="not finite"):
        fidelity(network, streams, windows[2:])


def test_text_is_one_string_without_special_tokens(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two\n\nthree one\n")
    assert tokenize_file(tokenizer(with_bos=True), text).tolist() == [2, 3, 4, 2]


def test_bos_is_taken_only_where_the_tokenizer_adds_it():
    assert default_bos(tokenizer(with_bos=True)) == 0
    assert default_bos(tokenizer(with_bos=False)) is None


def test_text_that_is_empty_absent_or_binary_is_refused(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, problem in (
        (empty, "holds no text"),
        (binary, "cannot be read"),
        (tmp_path / "absent.txt", "cannot be read"),
    ):
        with pytest.raises(SvdError, match=problem):
            tokenize_file(tokenizer(with_bos=True), path)
