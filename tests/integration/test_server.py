"""The unchanged OpenAI server: `--model DIR` and no flag of ours."""

import json
import shutil
from pathlib import Path

import pytest
from engine_cases import of
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


@pytest.mark.parametrize("name", ["pre_half", "pre_tiers"])
def test_completions_and_metrics(compressed, engines, prompts, tmp_path, name):
    model: Path = compressed(name)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with serve(model, FLAGS, tmp_path / "server.log", timeout=300) as server:
        body = {"model": str(model), "prompt": prompts[3], "max_tokens": 24, "ignore_eos": True}
        first = json.loads(server.request("/v1/completions", 120, body | {"temperature": 0}))
        several = body | {"n": 3, "seed": 0, "temperature": 1.0}
        samples = json.loads(server.request("/v1/completions", 120, several))
        cache = metrics.cache_config(metrics.read(server))
    expected = of(engines, name)["rounds"][0][3]["tokens"]
    assert first["choices"][0]["text"] == tokenizer.decode(expected)
    assert len({choice["text"] for choice in samples["choices"]}) == 3
    assert samples["usage"]["completion_tokens"] == 3 * 24
    totals = json.loads((model / "plan.json").read_text())["totals"]
    per_token = totals["kv_bytes_per_token"]
    assert totals["kv_bytes_per_token_dense"] >= per_token * {"pre_half": 2, "pre_tiers": 16}[name]
    assert cache.size_tokens == BUDGET // (per_token * cache.block_size) * cache.block_size


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
