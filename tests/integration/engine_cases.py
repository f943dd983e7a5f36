"""How integration tests make checkpoints, run engines on them and read the results."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_compress import pipeline, reference
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
MAX_TOKENS = 24
NAMES = ["weights_full", "pre_full", "post_full", "pre_half", "post_half"]
GROUPED = ["pre_grouped", "post_grouped"]  # both KV heads in one latent
MIXED = ["pre_mixed", "post_mixed"]
TIERED = ["pre_tiers", "post_tiers"]  # latents in a few bits each
# One dtype of fewer bits for all channels of the latents.
STORES = ["int8", "int4", "fp8_e4m3"]
BEAMS = ["pre_half", TIERED[0]]
CHUNKS = [16, 64, 256]
ARTEFACTS = ["auto", "codebooks", "int8_factors", "reduced"]
# Ranks that the native CPU kernel knows, ranks it does not, and unequal ones.
MIXED_RANKS = [(64, 64), (32, 32), (24, 40), (48, 16), (13, 7), (40, 40)]


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
        weight = source.read(f"{path}.weight")
        found = Svd().factorize(weight, LayerStatistics(), min(m, n))
        factors[path] = found.factors.to(torch.float32)
    measured = Measurements(
        base_model=model.name,
        text="none",
        text_sha256="",
        calibration_tokens=0,
        held_out_tokens=0,
        scored_tokens=0,
        context=0,
        perplexity_dense=0,
        perplexity=0,
        kl_to_dense=0,
        top1_agreement=1,
        matrices={},
        caches={},
        versions={},
    )
    ranks = plan(recipe, source)
    out.mkdir()
    tensors = {
        name: part for path, found in factors.items() for name, part in found.tensors(path).items()
    }
    write(
        out,
        source=source,
        recipe=recipe,
        plan=ranks,
        modules={path: found.config() for path, found in factors.items()},
        kv={},
        read=tensors.__getitem__,
        measured=measured,
    )
    return out


def bound(ranks: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND of so many processes: a core each, in turn where cores are few."""
    cores = os.environ.get("TEST_CORES", "").split() or sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


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


def rms(differences: torch.Tensor) -> float:
    return float(differences.double().square().mean().sqrt())


def apart(first: dict[str, Any], second: dict[str, Any], *kinds: str) -> torch.Tensor:
    """Differences of log-probabilities of the first round, of these kinds."""
    return torch.tensor(
        [
            a - b
            for one, other in zip(first["rounds"][0], second["rounds"][0], strict=True)
            for kind in kinds
            for a, b in zip(one[kind], other[kind], strict=True)
        ],
        dtype=torch.float64,
    )


def assert_only_flips(
    differences: torch.Tensor, effect: float, noise: float, other_library: bool = False
) -> None:
    """Log-probabilities of tiers differ as fp32 does, but for codes that flipped.

    A latent within fp32 noise of the border between two codes may fall to either side, which moves
    the tokens that read it by a step. Tokens before the first of these, a quarter at least, differ
    by fp32 noise, and all together by a small part of the effect of storing in few bits. Products
    of another library (transformers on torch's, vLLM on its own) have more of that noise, and flip
    more codes sooner; a wrong code or scale anywhere would move every token by all of it.
    """
    untouched, part = (0.1, 0.1) if other_library else (0.25, 0.05)
    assert differences.abs().quantile(untouched) <= 2 * noise
    assert rms(differences) <= part * effect


def planned_times(directory: Path) -> float:
    """How many times the tokens of a dense cache fit into the same bytes, by the plan."""
    totals = json.loads((directory / "plan.json").read_text())["totals"]
    return float(totals["kv_bytes_per_token_dense"] / totals["kv_bytes_per_token"])


def of(engines: dict[str, Any], name: str) -> dict[str, Any]:
    result = engines[name]
    assert "error" not in result, result["error"]
    return dict(result)


def tokens(result: dict[str, Any], number: int = 0) -> list[list[int]]:
    return [request["tokens"] for request in result["rounds"][number]]


def warm(result: dict[str, Any]) -> dict[str, Any]:
    """The rounds after the first, which find prefixes in the cache."""
    return {"rounds": result["rounds"][1:]}


@torch.inference_mode()
def deviations(
    result: dict[str, Any],
    model: Path,
    prompts: list[list[int]],
    change: Callable[[torch.nn.Module], None] = lambda _: None,
) -> torch.Tensor:
    """vLLM's log-probabilities minus those of transformers, to whose network `change` is made.

    Of generated tokens, and of prompts where vLLM was asked for those.
    """
    network = reference.load(model, "cpu", torch.float32)
    change(network)
    found = []
    for prompt, request in zip(prompts, result["rounds"][0], strict=True):
        ids = torch.tensor(prompt + request["tokens"])
        logprobs = network(ids[None]).logits[0, :-1].double().log_softmax(-1)
        expected = logprobs.gather(1, ids[1:, None])[:, 0]
        served = [*(request["prompt_logprobs"] or []), *request["logprobs"]]
        found.append(torch.tensor(served).double() - expected[-len(served) :])
    return torch.cat(found)


def without_codes(network: torch.nn.Module) -> None:
    """A change of `deviations`: latents of the same channels in the dtype of the network."""
    for module in network.modules():
        if isinstance(module, reference.LatentKV):
            module.k_tiers = module.v_tiers = ()
