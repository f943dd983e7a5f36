"""vLLM's Prometheus metrics: the KV cache it allocated and the counters of a load."""

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel, ConfigDict

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.server import Server


class CacheConfig(BaseModel):
    """The paged KV cache as vLLM allocated it (`vllm:cache_config_info`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_blocks: int
    block_size: int
    size_tokens: int
    max_concurrency: float
    memory_bytes: int | None

    @property
    def bytes_per_token(self) -> float | None:
        """Budget over allocated tokens: at most one block's worth above the exact size."""
        if self.memory_bytes is None:
            return None
        return self.memory_bytes / (self.num_blocks * self.block_size)


class Counters(BaseModel):
    """Totals since the server started, or of an interval after subtraction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int

    def __sub__(self, earlier: "Counters") -> "Counters":
        before = earlier.model_dump()
        return Counters(**{name: now - before[name] for name, now in self.model_dump().items()})


_COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
}
_CACHE_LABELS = (
    "num_gpu_blocks",
    "block_size",
    "kv_cache_size_tokens",
    "kv_cache_max_concurrency",
    "kv_cache_memory_bytes",
)


def read(server: Server) -> str:
    """The text that `/metrics` answers; raises BenchmarkError where the server does not."""
    return server.request("/metrics", timeout=30)


def cache_config(text: str) -> CacheConfig:
    """Parse `vllm:cache_config_info`; raises BenchmarkError where it or a part of it is absent."""
    name = "vllm:cache_config_info"
    for sample in _samples(text):
        if sample.name != name:
            continue
        labels = sample.labels
        if absent := [label for label in _CACHE_LABELS if label not in labels]:
            raise BenchmarkError(_absent([f"{name} with {label}" for label in absent]))
        memory = labels["kv_cache_memory_bytes"]
        return CacheConfig(
            num_blocks=int(labels["num_gpu_blocks"]),
            block_size=int(labels["block_size"]),
            size_tokens=int(labels["kv_cache_size_tokens"]),
            max_concurrency=float(labels["kv_cache_max_concurrency"]),
            memory_bytes=None if memory == "None" else int(memory),
        )
    raise BenchmarkError(_absent([name]))


def counters(text: str) -> Counters:
    """Sum every counter over engines; raises BenchmarkError that names those absent."""
    totals: dict[str, float] = {}
    for sample in _samples(text):
        totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    if absent := [name for name in _COUNTERS.values() if name not in totals]:
        raise BenchmarkError(_absent(absent))
    return Counters(**{field: int(totals[name]) for field, name in _COUNTERS.items()})


def _samples(text: str) -> list[Sample]:
    try:
        return [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
    except ValueError as error:
        raise BenchmarkError(
            f"/metrics answered what is not Prometheus text ({error}).\n"
            "Remedy: serve with vLLM 0.32."
        ) from None


def _absent(names: list[str]) -> str:
    return (
        f"/metrics answered without {', '.join(names)}, which vLLM 0.32 reports.\n"
        "Remedy: serve with vLLM 0.32, without --disable-log-stats."
    )
