"""Checkpoints of the demo model in fp32, and the engines that serve them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_compress import pipeline
from offline_compress import recipe as recipes
from offline_compress.calibration import LayerStatistics
from offline_compress.checkpoint import Measurements, write
from offline_compress.methods import Svd
from offline_compress.planning import plan
from offline_compress.weights import open_source

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "examples" / "wiki-llama-s"
TRAIN_TEXT = ROOT / "examples" / "wikitext-2" / "train.txt"
TEST_TEXT = ROOT / "examples" / "wikitext-2" / "test.txt"
WORKER = Path(__file__).with_name("engine_worker.py")

KV_HEADS, HEAD_DIM, LAYERS = 2, 64, 6
# Ranks that the native CPU kernel knows, ranks it does not, and unequal ones.
MIXED_RANKS = [(64, 64), (32, 32), (24, 40), (48, 16), (13, 7), (40, 40)]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model stored in fp32, so that full-rank bases are exact to fp32."""
    directory = tmp_path_factory.mktemp("dense") / "wiki-llama-s-fp32"
    AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(directory)
    return directory


def compress(model: Path, out: Path, **sections: Any) -> Path:
    """Compress with a small calibration; `sections` are those of a recipe."""
    recipe = recipes.CompressionRecipe.model_validate(
        {
            "calibration": {"text": str(TRAIN_TEXT), "samples": 4, "context": 128},
            "evaluation": {"samples": 2},
            **sections,
        }
    )
    pipeline.compress(recipe, str(model), out)
    return out


def projected(mode: str, ranks: list[tuple[int, int]], kept: float) -> dict[str, Any]:
    """A recipe that gives each layer its pair of ranks, and keeps `kept` of the weights."""
    layers = {i: {"k_rank": k, "v_rank": v} for i, (k, v) in enumerate(ranks)}
    return {"weights": {"kept": kept}, "kv": {"mode": mode, "layers": layers}}


def full_rank_weights(model: Path, out: Path) -> Path:
    """Every matrix as factors of full rank, but for one shard of each kind of fused layer.

    No recipe asks for this: such factors are larger than the matrix.
    """
    source = open_source(str(model))
    recipe = recipes.CompressionRecipe.model_validate({"weights": {"kept": 0.5}})
    factors = {}
    for path, (m, n) in source.linears().items():
        if path.startswith("model.layers.1.") and path.endswith(("k_proj", "up_proj")):
            continue
        ignored = LayerStatistics(gram=torch.eye(n), mean_abs=torch.ones(n), tokens=1)
        found = Svd().factorize(source.read(f"{path}.weight"), ignored, min(m, n))
        factors[path] = found.factors.to(torch.float32)
    measured = Measurements(
        base_model=model.name,
        text="none",
        calibration_tokens=0,
        held_out_tokens=0,
        context=0,
        perplexity_dense=0,
        perplexity=0,
        matrices={},
        caches={},
        versions={},
    )
    ranks = plan(recipe, source)
    write(
        out, source=source, recipe=recipe, plan=ranks, factors=factors, bases={}, measured=measured
    )
    return out


def run_engines(directory: Path, cases: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Run the cases in one worker process; on a crash, fail with the end of its log."""
    spec, result, log = (directory / name for name in ("spec.json", "result.json", "log.txt"))
    spec.write_text(json.dumps(cases))
    env = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(WORKER), str(spec), str(result)],
            stdout=output,
            stderr=output,
            env=env,
            timeout=1500,
            check=False,
        )
    if done.returncode != 0:
        pytest.fail(f"engine worker exited {done.returncode}:\n{log.read_text()[-4000:]}")
    return dict(json.loads(result.read_text()))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of 5 to 333 tokens from held-out text; the last two share a prefix."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer(TEST_TEXT.read_text()[:20000])["input_ids"]
    cuts = [(0, 5), (100, 64), (400, 200), (900, 333), (1500, 17), (2000, 150), (2000, 290)]
    return [ids[begin : begin + length] for begin, length in cuts]


Compressed = Callable[[str], Path]


@pytest.fixture(scope="session")
def compressed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """Compressed fp32 checkpoints of the demo model by name, each made once."""
    root = tmp_path_factory.mktemp("compressed")
    named: dict[str, dict[str, Any]] = {
        "pre_full": projected("pre", [(HEAD_DIM, HEAD_DIM)] * LAYERS, kept=1.0),
        "post_full": projected("post", [(HEAD_DIM, HEAD_DIM)] * LAYERS, kept=1.0),
        "pre_half": {"weights": {"kept": 1.0}, "kv": {"mode": "pre", "kept": 0.5}},
        "post_half": {"weights": {"kept": 0.8}, "kv": {"mode": "post", "kept": 0.5}},
        "pre_mixed": projected("pre", MIXED_RANKS, kept=0.6),
        "post_mixed": projected("post", MIXED_RANKS, kept=0.6),
    }

    def make(name: str) -> Path:
        out = root / name
        if not out.exists() and name == "weights_full":
            full_rank_weights(dense, out)
        elif not out.exists():
            compress(dense, out, **named[name])
        return out

    return make
