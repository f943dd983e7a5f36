"""Tasks of lm-eval in the laboratory, on a task of files alone."""

import json

import pytest
import torch

from benchmarks.offline.tasks import Tasks
from offline_compress import reference
from offline_compress.preflight import load_tokenizer
from vllm_svd.errors import SvdError

DOCS = [
    {"text": "The city of", "choices": [" London", " the"], "answer": 0},
    {"text": "In the year", "choices": [" 1900", " was a game"], "answer": 1},
    {"text": "The game was", "choices": [" released", " of", " song"], "answer": 2},
    {"text": "It is a", "choices": [" film", " and"], "answer": 1},
]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "choices.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path


@torch.no_grad()
def expected(model, tokenizer):
    """The fraction of documents whose right choice is the likeliest continuation."""
    right = []
    for doc in DOCS:
        scores = []
        for choice in doc["choices"]:
            start = tokenizer(doc["text"])["input_ids"]
            whole = tokenizer(doc["text"] + choice)["input_ids"]
            logits = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            ends = range(len(start) - 1, len(whole) - 1)
            scores.append(sum(float(logits[at, whole[at + 1]]) for at in ends))
        right.append(scores.index(max(scores)) == doc["answer"])
    return right


def test_scores_are_those_of_the_model_that_was_loaded(noisy_checkpoint, directory):
    where = noisy_checkpoint("llama")
    model, tokenizer = reference.load(where, "cpu", torch.float32), load_tokenizer(where)
    right = expected(model, tokenizer)
    scores = Tasks(["choices"], directory).scores(model, tokenizer, 2)
    assert scores == {"choices": pytest.approx(sum(right) / len(right))}
    limited = Tasks(["choices"], directory, limit=2).scores(model, tokenizer, 2)
    assert limited == {"choices": pytest.approx(sum(right[:2]) / 2)}


def test_a_task_that_nobody_knows_is_refused(directory):
    with pytest.raises(SvdError, match=r"absent: lm-eval has no such task\n.*--task-path"):
        Tasks(["choices", "absent"], directory)
    assert Tasks([]).scores(None, None, 1) == {}


def test_without_lm_eval_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(SvdError, match=r"needs lm-eval.*\n.*vllm-svd\[tasks\]"):
        Tasks(["choices"])
