"""One vLLM engine in this process, at the command of its parent: `worker.py MODEL ENGINE`.

ENGINE is a JSON object of arguments for vllm.LLM. A line {"prompts": [[ids]], "tokens": n} on
standard input is answered with {"seconds": s} on the original standard output: the time of n tokens
for every prompt, less that of one. What vLLM prints goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any


def main(model: str, engine: str) -> None:
    """Serve commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model, **json.loads(engine))

    def seconds(prompts: list[Any], tokens: int) -> float:
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - started

    print("{}", file=answers)
    for line in sys.stdin:
        given = json.loads(line)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in given["prompts"]]
        first = seconds(prompts, 1)
        print(json.dumps({"seconds": seconds(prompts, given["tokens"]) - first}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
