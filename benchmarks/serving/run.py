"""The comparison: quality first, then every server in turn with the same flags and load."""

import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.machine import busy, machine
from benchmarks.serving import checkpoint, load, metrics, prompts, results
from benchmarks.serving.progress import step
from benchmarks.serving.protocol import Protocol
from benchmarks.serving.results import Comparison, Measured, Quality
from benchmarks.serving.server import serve
from benchmarks.serving.table import NOISY


def compare(models: dict[str, Path], text: Path, protocol: Protocol, out: Path) -> Comparison:
    """Measure every model of `models` (name: directory, dense first) under `protocol`.

    Raw results and logs go to `out`/raw. Raises BenchmarkError at the first server, load or
    evaluation that fails: a comparison with a part missing compares nothing.
    """
    protocol.check()
    for directory in models.values():
        checkpoint.kv_bytes_per_token(directory)  # a config it cannot read is refused now
    raw = out / "raw"
    datasets = _datasets(next(iter(models.values())), text, protocol, raw)
    quality = {}
    for name, directory in models.items():
        with step(f"{name}: perplexity on {text}") as current:
            quality[name] = checkpoint.evaluate(directory, text, raw / name / "evaluate.log")
            current.note(f"{quality[name].perplexity:.2f}")
    return Comparison(
        date=results.now(),
        command=results.command_line(),
        text=str(text),
        protocol=protocol,
        machine=machine(),
        servers=tuple(
            _measure(name, directory, quality[name], protocol, datasets, raw / name)
            for name, directory in models.items()
        ),
    )


def _datasets(tokenizer: Path, text: Path, protocol: Protocol, raw: Path) -> list[Path]:
    files = [raw / f"prompts-{repeat + 1}.json" for repeat in range(protocol.repeats)]
    if protocol.prompts == "text":
        count = protocol.requests * protocol.repeats
        passages = prompts.cut(tokenizer, text, count, protocol.input_len)
        for file, hand in zip(files, prompts.deal(passages, protocol.repeats), strict=True):
            prompts.write(hand, file)
    return files


def _measure(
    name: str,
    directory: Path,
    quality: Quality,
    protocol: Protocol,
    datasets: list[Path],
    raw: Path,
) -> Measured:
    with ExitStack() as stack:
        with step(f"{name}: vLLM server on {directory}") as current:
            server = stack.enter_context(
                serve(
                    directory, protocol.server_flags(), raw / "server.log", protocol.start_timeout
                )
            )
            start_seconds = current.seconds
            cache = metrics.cache_config(metrics.read(server))
            current.note(f"KV cache of {cache.size_tokens} tokens")
        with step(f"{name}: warm-up") as current:
            load.warm_up(server, directory, protocol)
            # Time for the engine to fall idle: what is still busy then is not ours.
            time.sleep(1)
            background = busy(2)
            if background > NOISY:
                current.note(f"the CPU is {background:.0%} busy with something else")
        before = metrics.counters(metrics.read(server))
        sent = f"{protocol.repeats} x {protocol.requests} requests"
        with step(f"{name}: {sent}, {protocol.concurrency} at a time") as current:
            rounds = load.send(server.base_url, directory, protocol, datasets, raw, current.line)
            counted = metrics.counters(metrics.read(server)) - before
            current.note(f"{counted.preemptions} preemptions")
    return Measured(
        name=name,
        directory=str(directory),
        checkpoint_bytes=checkpoint.weight_bytes(directory),
        stored_kv_bytes_per_token=checkpoint.kv_bytes_per_token(directory),
        quality=quality,
        start_seconds=round(start_seconds, 1),
        background=round(background, 3),
        cache=cache,
        counters=counted,
        rounds=tuple(rounds),
    )
