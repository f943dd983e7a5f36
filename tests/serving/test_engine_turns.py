"""Engines that take turns, against real vLLM on the example model."""

import re
from pathlib import Path

import pytest

from benchmarks.engine.engines import started
from benchmarks.engine.turns import Load, measure
from benchmarks.serving.errors import BenchmarkError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "wiki-llama-s"

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_engine_is_timed_in_every_round(tmp_path):
    load = Load(
        text=EXAMPLES / "wikitext-2" / "test.txt",
        batches=(1, 2),
        input_len=16,
        output_len=8,
        rounds=2,
        enforce_eager=True,
    )
    models = {"dense": MODEL, "same": MODEL}
    rows = measure(models, {"dense": 40.0, "same": 41.0}, load, "float32", tmp_path)
    assert [(row.batch, row.engine) for row in rows] == [
        *((1, name) for name in models),
        *((2, name) for name in models),
    ]
    for dense, same in (rows[:2], rows[2:]):
        assert dense.times_dense == (1.0, 1.0) and min(same.seconds) > 0
        assert same.times_dense == pytest.approx(
            [a / b for a, b in zip(dense.seconds, same.seconds, strict=True)]
        )
        assert (dense.perplexity, same.perplexity) == (40.0, 41.0)


def test_an_engine_that_fails_says_why_and_where_its_log_is(tmp_path):
    with (
        pytest.raises(BenchmarkError, match=re.escape(str(tmp_path / "dense.log"))),
        started({"dense": MODEL}, {"max_model_len": 1 << 30}, tmp_path),
    ):
        pass
