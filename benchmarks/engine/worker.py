"""One vLLM engine in this process, at the command of its parent: `worker.py MODEL ENGINE`.

ENGINE is a JSON object of arguments for vllm.LLM. A line {"prompts": [[ids]], "tokens": n} on
standard input is answered with {"seconds": s} on the original standard output: from the first token
of the batch to its last, as the engine itself takes the time. What vLLM prints goes to standard
error.
"""

import json
import os
import sys


def main(model: str, engine: str) -> None:
    """Serve commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model, disable_log_stats=False, **json.loads(engine))
    print("{}", file=answers)
    for line in sys.stdin:
        given = json.loads(line)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in given["prompts"]]
        sampling = SamplingParams(temperature=0, max_tokens=given["tokens"], ignore_eos=True)
        found = [one.metrics for one in llm.generate(prompts, sampling, use_tqdm=False)]
        first = max(times.first_token_ts for times in found)
        seconds = max(times.last_token_ts for times in found) - first
        print(json.dumps({"seconds": seconds}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
