"""Checkpoints of the demo model in fp32, and the engines that serve them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    ARTEFACTS,
    BEAMS,
    CHUNKS,
    DEMO_MODEL,
    GROUPED,
    HEAD_DIM,
    LAYERS,
    MAX_TOKENS,
    MIXED,
    MIXED_RANKS,
    NAMES,
    STORES,
    TEST_TEXT,
    TIERED,
    apart,
    assert_only_flips,
    compress,
    deviations,
    full_rank_weights,
    of,
    projected,
    rms,
    run_engines,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model stored in fp32, so that full-rank bases are exact to fp32."""
    directory = tmp_path_factory.mktemp("dense") / "wiki-llama-s-fp32"
    AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(directory)
    return directory


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
        "pre_grouped": {"weights": {"kept": 1.0}, "kv": {"group": 2, "kept": 0.25}},
        "post_grouped": {
            "weights": {"kept": 1.0},
            "kv": {"mode": "post", "group": 2, "k_kept": 0.3, "v_kept": 0.2},
        },
        "pre_mixed": projected("pre", MIXED_RANKS, kept=0.6),
        "post_mixed": projected("post", MIXED_RANKS, kept=0.6),
        "pre_tiers": {
            "weights": {"kept": 1.0},
            "kv": {"group": 2, "kept": 0.0625, "store": "tiers", "allocator": "measured"},
        },
        "post_tiers": {
            "weights": {"kept": 1.0},
            "kv": {"mode": "post", "kept": 0.125, "store": "tiers"},
        },
        **{
            store: {"weights": {"kept": 1.0}, "kv": {"kept": 0.1, "store": store}}
            for store in STORES
        },
        "auto": {"weights": {"method": "auto", "kept": 0.1}, "kv": {"kept": 0.5}},
        "codebooks": {
            "weights": {"method": {"name": "gptvq", "em_iterations": 10}, "kept": 0.08},
            "kv": {"kept": None},
        },
        "int8_factors": {
            "weights": {"method": "dobi_svd", "allocator": "uniform", "kept": 0.4},
            "kv": {"mode": "post", "kept": 0.5},
        },
        "reduced": {
            "weights": {"method": "modegpt", "allocator": "uniform", "kept": 0.5},
            "kv": {"kept": None},
        },
    }

    def make(name: str) -> Path:
        out = root / name
        if not out.exists() and name == "weights_full":
            full_rank_weights(dense, out)
        elif not out.exists():
            compress(dense, out, **named[name])
        return out

    return make


@pytest.fixture(scope="session")
def engines(dense: Path, compressed: Any, prompts: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Every fp32 and bf16 engine of one rank, run once; results by case name."""

    def case(model: Path, rounds: int = 2, **engine: Any) -> dict[str, Any]:
        return {
            "model": str(model),
            "prompts": prompts,
            "max_tokens": MAX_TOKENS,
            "rounds": rounds,
            "engine": engine,
        }

    cases = {"dense": case(dense)}
    every = NAMES + GROUPED + MIXED + TIERED + ARTEFACTS
    cases |= {name: case(compressed(name)) for name in every}
    for name in MIXED + TIERED:
        model = compressed(name)
        for chunk in CHUNKS:
            cases[f"{name}_chunks_of_{chunk}"] = case(
                model, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 64)
            )
        cases[f"{name}_full_pool"] = case(model, num_gpu_blocks_override=24, block_size=32)
        cases[f"{name}_compiled"] = case(model, enforce_eager=False)
        cases[f"{name}_bf16"] = case(model, dtype="bfloat16")
    cases |= {store: case(compressed(store), rounds=1) for store in STORES}
    for name in BEAMS:
        cases[name]["beams"] = 3
    for dtype in ("fp8", "int8_per_token_head"):
        cases[dtype] = case(compressed(TIERED[0]), kv_cache_dtype=dtype)
    cases["post_mixed_bf16_compiled"] = case(
        compressed("post_mixed"), dtype="bfloat16", enforce_eager=False
    )
    cases["dense_bf16"] = case(dense, dtype="bfloat16")
    for name, model in (("dense", dense), ("post_half", compressed("post_half"))):
        cases[f"{name}_fp8"] = case(model, kv_cache_dtype="fp8")
    cases["post_half_native"] = case(compressed("post_half")) | {"without_numba": True}  # the last
    return run_engines(tmp_path_factory.mktemp("engines"), cases)


@pytest.fixture(scope="session")
def dense_deviation(engines, dense, prompts) -> float:
    """How far two fp32 implementations of the same dense model differ (RMS)."""
    return float(deviations(of(engines, "dense"), dense, prompts).square().mean().sqrt())


@pytest.fixture(scope="session")
def same_but_for_flips(engines, dense_deviation):
    """`assert_only_flips` against the demo model's dense engine and its noise."""

    def check(differences, name, other_library=False) -> None:
        effect = rms(apart(of(engines, "dense"), of(engines, name), "prompt_logprobs"))
        assert_only_flips(differences, effect, dense_deviation, other_library)

    return check
