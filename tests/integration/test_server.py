"""The unchanged OpenAI server: `--model DIR` and no flag of ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_cases import bound, of, tokens
from prometheus_client.parser import text_string_to_metric_families as parsed
from transformers import AutoTokenizer

from benchmarks.serving import metrics
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.server import serve

pytestmark = pytest.mark.engine

BUDGET = 8 << 20


FLAGS = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    f"--kv-cache-memory-bytes={BUDGET}",
    "--gpu-memory-utilization=0.3",
]


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("name", "replicas"), [("pre_half", 1), ("pre_half", 2), ("pre_tiers", 2)])
def test_completions_and_metrics(
    compressed, engines, prompts, tmp_path, monkeypatch, name, replicas
):
    """Of one engine and of data-parallel ones, which answer lone requests in turn."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound(2))  # by itself vLLM takes one core twice
    model: Path = compressed(name)
    tokenizer = AutoTokenizer.from_pretrained(model)
    flags = [*FLAGS, f"--data-parallel-size={replicas}"]
    with serve(model, flags, tmp_path / "server.log", timeout=300) as server:

        def complete(prompt: list[int], **sampling: float) -> dict[str, Any]:
            body = {"model": str(model), "prompt": prompt, "max_tokens": 24, "ignore_eos": True}
            return dict(json.loads(server.request("/v1/completions", 120, body | sampling)))

        greedy = [complete(prompt, temperature=0)["choices"][0]["text"] for prompt in prompts]
        samples = complete(prompts[3], n=3, seed=0, temperature=1.0)
        text = metrics.read(server)
    assert greedy == [tokenizer.decode(ids) for ids in tokens(of(engines, name))]
    assert len({choice["text"] for choice in samples["choices"]}) == 3
    assert samples["usage"]["completion_tokens"] == 3 * 24
    generated = _by_engine(text, "vllm:generation_tokens_total")
    assert len(generated) == replicas and min(generated.values()) > 0
    assert sum(generated.values()) == 24 * (len(prompts) + 3)
    cache = metrics.cache_config(text)
    totals = json.loads((model / "plan.json").read_text())["totals"]
    per_token = totals["kv_bytes_per_token"]
    assert totals["kv_bytes_per_token_dense"] >= per_token * {"pre_half": 2, "pre_tiers": 16}[name]
    assert cache.size_tokens == BUDGET // (per_token * cache.block_size) * cache.block_size


def _by_engine(text: str, name: str) -> dict[str, float]:
    """The values of a metric by the engine that reports them."""
    samples = (sample for family in parsed(text) for sample in family.samples)
    return {sample.labels["engine"]: sample.value for sample in samples if sample.name == name}


@pytest.mark.parametrize("damage", ["bit flip", "truncation", "missing tensor", "format version"])
def test_a_damaged_checkpoint_is_refused_by_name(compressed, tmp_path, damage):
    broken = tmp_path / "broken"
    shutil.copytree(compressed("pre_half"), broken)
    shard = next(broken.glob("*.safetensors"))
    if damage == "bit flip":
        with shard.open("r+b") as file:
            file.seek(-1000, 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
    elif damage == "truncation":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "missing tensor":
        manifest = json.loads((broken / "manifest.json").read_text())
        del manifest["tensors"]["model.layers.0.self_attn.attn.k_up"]
        (broken / "manifest.json").write_text(json.dumps(manifest))
    else:
        config = json.loads((broken / "config.json").read_text())
        config["quantization_config"]["format_version"] = 99
        (broken / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(BenchmarkError) as refused,
        serve(broken, FLAGS, tmp_path / "server.log", timeout=300),
    ):
        pass
    message = str(refused.value)
    named = {
        "bit flip": "contents changed",
        "truncation": "bytes long where its header promises",
        "missing tensor": "model.layers.0.self_attn.attn.k_up: promised by config.json",
        "format version": "format_version is 99",
    }
    assert named[damage] in message and "Remedy" in message
