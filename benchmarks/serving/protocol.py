"""What is held equal between the servers: flags, KV bytes, load and its repeats."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from benchmarks.serving.errors import BenchmarkError

# vLLM's ShareGPT reader silently drops longer requests.
_TEXT_INPUT = 1024
_TEXT_TOTAL = 2048


class Protocol(BaseModel):
    """One load, sent `repeats` times to every server; lengths in tokens, times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_bytes: PositiveInt
    requests: PositiveInt
    input_len: int = Field(ge=4)
    output_len: int = Field(ge=2)
    concurrency: PositiveInt
    repeats: PositiveInt
    prompts: Literal["text", "random"]
    max_model_len: PositiveInt
    enforce_eager: bool
    server_args: tuple[str, ...] = ()
    start_timeout: PositiveFloat
    load_timeout: PositiveFloat

    def check(self) -> None:
        """Raise BenchmarkError with every combination that vLLM would refuse or drop."""
        problems = []
        # One token more: the BOS that many tokenizers prepend.
        total = self.input_len + self.output_len + 1
        if total > self.max_model_len:
            problems.append(
                f"--input-len {self.input_len} + --output-len {self.output_len} + 1 exceeds "
                f"--max-model-len {self.max_model_len}"
            )
        if self.prompts == "text" and (self.input_len >= _TEXT_INPUT or total > _TEXT_TOTAL):
            problems.append(
                f"--prompts text carries fewer than {_TEXT_INPUT} input and {_TEXT_TOTAL} tokens "
                f"in all per request; use --prompts random for longer ones"
            )
        if problems:
            raise BenchmarkError("\n".join(problems))

    def server_flags(self) -> list[str]:
        """The flags of every server, dense or compressed."""
        flags = ["--max-model-len", str(self.max_model_len)]
        flags += ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        flags += ["--enforce-eager"] if self.enforce_eager else []
        return [*flags, *self.server_args]

    def load_flags(self, model: Path, repeat: int, dataset: Path) -> list[str]:
        """The flags of `vllm bench serve` for one repeat."""
        flags = ["--backend", "openai", "--endpoint", "/v1/completions", "--model", str(model)]
        flags += ["--num-prompts", str(self.requests), "--seed", str(repeat), "--ignore-eos"]
        flags += ["--max-concurrency", str(self.concurrency), "--temperature", "0"]
        flags += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"]
        flags += ["--save-result", "--save-detailed", "--disable-tqdm"]
        if self.prompts == "text":
            flags += ["--dataset-name", "sharegpt", "--dataset-path", str(dataset)]
            return [*flags, "--sharegpt-output-len", str(self.output_len), "--no-oversample"]
        flags += ["--dataset-name", "random", "--random-input-len", str(self.input_len)]
        return [*flags, "--random-output-len", str(self.output_len)]
