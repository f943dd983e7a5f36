"""The comparison end to end against a real vLLM server on the example model."""

from pathlib import Path

import pytest

from benchmarks.serving.protocol import Protocol
from benchmarks.serving.run import compare

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.engine
def test_every_token_asked_for_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLES / "wikitext-2" / "test.txt").read_text()[:40_000])
    protocol = Protocol(
        kv_bytes=8 * 128 * 3072,
        requests=6,
        input_len=48,
        output_len=8,
        concurrency=3,
        repeats=2,
        prompts="text",
        max_model_len=256,
        enforce_eager=True,
        start_timeout=300,
        load_timeout=200,
    )
    model = EXAMPLES / "wiki-llama-s"
    (dense,) = compare({"dense": model}, text, protocol, tmp_path / "out").servers
    assert (dense.cache.num_blocks, dense.cache.size_tokens) == (8, 8 * 128)
    # Every repeat does all of its work, and nothing else reaches the server.
    work = protocol.requests * protocol.repeats
    assert [result.failed for result in dense.rounds] == [0, 0]
    sent = sum(result.total_input_tokens for result in dense.rounds)
    assert dense.counters.prompt_tokens == sent
    assert abs(sent / work - (protocol.input_len + 1)) <= 2
    assert dense.counters.generation_tokens == work * protocol.output_len
    assert dense.counters.prefix_cache_hits == 0
    assert dense.quality.context == 512
