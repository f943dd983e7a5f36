"""Run real vLLM engines one after another in this process: `engine_worker.py SPEC RESULT`.

SPEC maps case names to {model, engine, prompts, max_tokens} and what run_case reads beside; RESULT
maps them to what vLLM returned, or to {"error": message}. Engines live in this process (no engine
subprocess) unless the case asks for tensor parallelism, so that a start costs seconds.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams

    from vllm_svd.kernels import native

    if case.get("without_numba"):  # for good
        native.is_there = lambda: False
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "gpu_memory_utilization": 0.3,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        **case.get("engine", {}),
    }
    llm = LLM(case["model"], **engine)
    # Prompt log-probabilities make vLLM recompute the prompt: later rounds use the prefix cache.
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=case["max_tokens"],
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0 if number == 0 and case.get("prompt_logprobs", True) else None,
        )
        for number in range(case.get("rounds", 2))
    ]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in case["prompts"]]
    lora = LoRARequest("adapter", 1, case["lora"]) if "lora" in case else None
    rounds, preemptions = [], []
    for number, parameters in enumerate(sampling):
        before = _metrics(llm)["vllm:num_preemptions"]
        # And back: a full pool still holds the last prompts of the round before, which come first.
        turn = -1 if number % 2 else 1
        outputs = llm.generate(prompts[::turn], parameters, use_tqdm=False, lora_request=lora)
        rounds.append([_request(output) for output in outputs[::turn]])
        preemptions.append(_metrics(llm)["vllm:num_preemptions"] - before)
    beams = []
    if width := case.get("beams"):
        parameters = BeamSearchParams(width, max_tokens=case["max_tokens"], ignore_eos=True)
        found = llm.beam_search([dict(prompt) for prompt in prompts], parameters)
        beams = [[beam.cum_logprob for beam in one.sequences] for one in found]
    config = llm.llm_engine.vllm_config
    cache, layers = config.cache_config, config.compilation_config.static_forward_context
    return {
        "rounds": rounds,
        "beams": beams,
        "kv_cache_tokens": cache.kv_cache_size_tokens,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "implementations": sorted({type(layer.impl).__name__ for layer in layers.values()}),
        "preemptions": preemptions,
        "drafts": _metrics(llm).get("vllm:spec_decode_num_draft_tokens"),
        "accepted_drafts": _metrics(llm).get("vllm:spec_decode_num_accepted_tokens"),
    }


def _metrics(llm: Any) -> dict[str, Any]:
    return {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}


def _request(output: Any) -> dict[str, Any]:
    def chosen(ids: list[int], logprobs: Any) -> list[float]:
        return [entry[i].logprob for i, entry in zip(ids, logprobs, strict=True) if entry]

    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": chosen(completion.token_ids, completion.logprobs),
        "prompt_logprobs": chosen(output.prompt_token_ids, output.prompt_logprobs)
        if output.prompt_logprobs
        else None,
        "cached_tokens": output.num_cached_tokens,
    }


def main(spec: str, result: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    results = {}
    for name, case in json.loads(Path(spec).read_text()).items():
        print(f"=== {name}", file=sys.stderr, flush=True)
        try:
            results[name] = run_case(case)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(result).write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main(*sys.argv[1:])
