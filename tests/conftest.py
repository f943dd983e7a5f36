"""Tiny random checkpoints of every family, shared by the whole suite."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Cores of its own, before torch counts them: threads that share one wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    os.environ["TEST_CORES"] = " ".join(map(str, cores))  # for those that need several
    mine = cores[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, mine or cores)

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter, which must be chosen before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Machines are noisy: no test may fail for being slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "examples" / "wiki-llama-s"
# Files that read the `engines` of the whole session, which take minutes to run.
ENGINES = [
    f"tests/integration/test_{n}.py" for n in ("engine", "features", "tensor_parallel", "server")
]
DEMO_TEXT = ROOT / "examples" / "wikitext-2" / "test.txt"

_SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, True),
    "mistral": (MistralForCausalLM, MistralConfig, False),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, True),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, False),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, False),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, False),
}

_DEVIATIONS = {
    # Weights large enough for both soft caps to bend what they cap; the first layer slides.
    "gemma2": {
        "initializer_range": 0.1,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 1.0,
        "sliding_window": 16,
    },
    # vLLM's Qwen2 derives the head size from the hidden size.
    "qwen2": {"hidden_size": 128},
    "qwen3_moe": {
        "mlp_only_layers": [0],
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several processes one runs all tests of ENGINES; others take file after file."""
    from xdist.scheduler import LoadScopeScheduling

    class EnginesInOne(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = _file(nodeid)
            return "engines" if file in ENGINES else file

    config.option.loadscopereorder = False  # the longest comes first as it is
    return EnginesInOne(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items):
    for item in items:
        reads = "engines" in getattr(item, "fixturenames", ())
        if reads and _file(item.nodeid) not in ENGINES:
            raise pytest.UsageError(f"{item.nodeid} reads `engines`: add its file to ENGINES")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Directory of a random fp32 model of a family, with the demo model's tokenizer.

    The model is the same in every run; treat the directory as read-only.
    """
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model_class, config_class, tied = _FAMILIES[family]
            shape = _SHAPE | _DEVIATIONS.get(family, {})
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = model_class(config_class(**shape, tie_word_embeddings=tied))
            directory = tmp_path_factory.mktemp("checkpoints") / f"tiny-{family}"
            model.float().save_pretrained(directory)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(DEMO_MODEL / name, directory / name)
            made[family] = directory
        return made[family]

    return make


@pytest.fixture(scope="session")
def short_text(tmp_path_factory) -> Path:
    """The first 60 kB of the demo text: tokenised in an instant."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(DEMO_TEXT.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return path
