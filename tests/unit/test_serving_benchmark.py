"""The serving benchmark on recorded output of real servers, and on real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.serving import checkpoint, load, metrics, output, prompts, report, server, table
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.protocol import Protocol
from benchmarks.serving.results import Comparison
from vllm_svd.format import KVProjection

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded")
MODEL = ROOT / "examples" / "wiki-llama-s"
TEXT = ROOT / "examples" / "wikitext-2" / "test.txt"


@pytest.fixture
def exposition() -> str:
    return (RECORDED / "metrics.txt").read_text()


@pytest.fixture
def comparison() -> Comparison:
    return Comparison.model_validate_json((RECORDED / "serving_report.json").read_text())


def _protocol(**changed: object) -> Protocol:
    given = json.loads((RECORDED / "serving_report.json").read_text())["protocol"]
    return Protocol.model_validate(given | changed)


# metrics


def test_cache_config_agrees_with_itself(exposition: str) -> None:
    cache = metrics.cache_config(exposition)
    assert cache.size_tokens == cache.num_blocks * cache.block_size
    assert cache.memory_bytes is not None
    # The budget minus less than one block of the model's 3072 bytes per token.
    exact = checkpoint.kv_bytes_per_token(MODEL)
    assert cache.num_blocks == cache.memory_bytes // (cache.block_size * exact)
    assert cache.bytes_per_token is not None
    assert exact <= cache.bytes_per_token < exact * (1 + 1 / cache.num_blocks)


def test_counters_sum_over_engines(exposition: str) -> None:
    once = metrics.counters(exposition)
    assert once.generation_tokens > 0
    second = "\n".join(
        line.replace('engine="0"', 'engine="1"')
        for line in exposition.splitlines()
        if not line.startswith("#")
    )
    twice = metrics.counters(f"{exposition}\n{second}\n")
    assert twice - once == once
    assert set((once - once).model_dump().values()) == {0}


def test_missing_metrics_are_named(exposition: str) -> None:
    rows = [row for row in exposition.splitlines() if "preemptions" not in row]
    with pytest.raises(BenchmarkError, match="vllm:num_preemptions_total"):
        metrics.counters("\n".join(rows) + "\n")
    with pytest.raises(BenchmarkError, match="vllm:cache_config_info"):
        metrics.cache_config("")
    with pytest.raises(BenchmarkError, match="vllm:cache_config_info with num_gpu_blocks"):
        metrics.cache_config(exposition.replace("num_gpu_blocks=", "blocks="))
    with pytest.raises(BenchmarkError, match="is not Prometheus text"):
        metrics.counters("nonsense\n{}\n")


# the report


def test_report_is_complete_and_self_contained(comparison: Comparison, tmp_path: Path) -> None:
    page = report.write(comparison, tmp_path).read_text()
    for row in table.ROWS:
        assert row.label in page
        for measured in comparison.servers:
            assert row.cell(measured, comparison.servers[0]) in page
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page
    assert "https://" not in page
    for name in ("throughput.png", "latency.png", "kv_cache.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    written = Comparison.model_validate_json((tmp_path / report.JSON_FILE).read_text())
    assert written == comparison
    assert not list(tmp_path.glob("*.partial"))


def test_ratios_are_to_dense(comparison: Comparison) -> None:
    dense, *compressed = comparison.servers
    assert dense.name == "dense"
    for row in table.ROWS:
        assert not row.cell(dense, dense).endswith("x)")
    kv = next(row for row in table.ROWS if row.label == "KV bytes per token")
    for measured in compressed:
        ratio = measured.stored_kv_bytes_per_token / dense.stored_kv_bytes_per_token
        assert kv.cell(measured, dense).endswith(f"({ratio:.2f}x)")


def test_spread_encloses_every_repeat(comparison: Comparison) -> None:
    for measured in comparison.servers:
        for field in load.Round.model_fields:
            spread = measured.spread(field)
            assert spread.low <= spread.median <= spread.high
            assert {spread.low, spread.high} <= {getattr(r, field) for r in measured.rounds}


def test_a_busy_machine_is_named(comparison: Comparison) -> None:
    quiet = [server.model_copy(update={"background": 0.0}) for server in comparison.servers]
    assert table.warning(comparison.model_copy(update={"servers": tuple(quiet)})) == ""
    quiet[-1] = quiet[-1].model_copy(update={"background": table.NOISY + 0.2})
    said = table.warning(comparison.model_copy(update={"servers": tuple(quiet)}))
    assert quiet[-1].name in said
    assert quiet[0].name not in said


# checkpoints and prompts


def test_kv_bytes_follow_the_projected_ranks(tmp_path: Path) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    dense = checkpoint.kv_bytes_per_token(MODEL)
    assert dense == 6 * 2 * (64 + 64) * 2
    layer = {"mode": "pre", "num_kv_heads": 2, "head_dim": 64, "k_rank": 24, "v_rank": 40}
    config["quantization_config"] = {"kv": {"model.layers.0.self_attn": layer}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.kv_bytes_per_token(tmp_path) == dense - 2 * (128 - 64) * 2
    layer |= {
        "k_tiers": [{"channels": 8, "store": "int8"}, {"channels": 16, "store": "int4"}],
        "v_tiers": [{"channels": 40, "store": "int2"}],
        "group": 2,
    }
    tiered = KVProjection.model_validate(layer)
    assert tiered.bytes_per_token(2) == (8 + 1) + (8 + 1) + (10 + 1) + 3
    config["quantization_config"] = {"kv": {"model.layers.0.self_attn": layer}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = dense * 5 // 6 + tiered.bytes_per_token(2)
    assert checkpoint.kv_bytes_per_token(tmp_path) == expected


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="is not a checkpoint"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "not a JSON object"),
        ("caf\xe9", "cannot be read"),
        ('{"num_hidden_layers": 2}', "it lacks 'num_attention_heads'"),
        ({"dtype": "int3"}, "dtype 'int3'; accepted are float32, bfloat16, float16"),
        ({"dtype": ["bfloat16"]}, "accepted are float32"),
        ({"num_hidden_layers": "six"}, "is not that of a decoder"),
        ({"quantization_config": {"kv": [1]}}, "is not that of a decoder"),
    ],
)
def test_a_config_that_is_no_decoder_is_refused(
    tmp_path: Path, config: str | dict[str, object], said: str
) -> None:
    if isinstance(config, dict):
        config = json.dumps(json.loads((MODEL / "config.json").read_text()) | config)
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(BenchmarkError, match=said) as caught:
        checkpoint.kv_bytes_per_token(tmp_path)
    assert "Remedy: " in str(caught.value)


def test_a_bad_tokenizer_and_a_text_of_another_encoding_are_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(BenchmarkError, match=r"latin\.txt cannot be read as UTF-8"):
        prompts.cut(MODEL, latin, 1, 4)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"tokenizer\.json is not a tokenizer"):
        prompts.cut(tmp_path, TEXT, 1, 4)


# the report directory


def test_only_an_earlier_report_is_cleared_and_only_of_what_we_wrote(
    comparison: Comparison, tmp_path: Path
) -> None:
    output.prepare(tmp_path / "absent")
    output.prepare(tmp_path)
    raw = tmp_path / "raw"
    theirs = [tmp_path / "thesis.tex", raw / "notes.txt", raw / "dense" / "more.txt"]
    ours = [raw / "prompts-1.json", raw / "dense" / "repeat-1.json", raw / "dense" / "server.log"]
    (raw / "dense").mkdir(parents=True)
    for path in [*theirs, *ours]:
        path.write_text("x")
    for foreign in (None, "{}", "no json"):
        if foreign is not None:
            (tmp_path / report.JSON_FILE).write_text(foreign)
        with pytest.raises(BenchmarkError, match="is not empty and holds no") as caught:
            output.prepare(tmp_path)
        assert "Remedy: " in str(caught.value)
        assert all(path.exists() for path in [*theirs, *ours])
    report.write(comparison, tmp_path)
    output.prepare(tmp_path)
    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in ours)


def test_prompts_are_distinct_passages_of_the_text(tmp_path: Path) -> None:
    passages = prompts.cut(MODEL, TEXT, 40, 64)
    text = TEXT.read_text()
    assert all(passage in text for passage in passages)
    assert len({passage[:40] for passage in passages}) == 40
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for passage in passages:
        assert abs(len(tokenizer.encode(passage, add_special_tokens=False).ids) - 64) <= 2
    hands = list(prompts.deal(passages, 3))
    assert sorted(passage for hand in hands for passage in hand) == sorted(passages)
    prompts.write(hands[0], tmp_path / "prompts.json")
    turns = json.loads((tmp_path / "prompts.json").read_text())
    assert [turn["conversations"][0]["value"] for turn in turns] == hands[0]


def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    with pytest.raises(BenchmarkError, match="too few for 8 prompts of 16 tokens"):
        prompts.cut(MODEL, short, 8, 16)


def test_protocol_collects_every_problem() -> None:
    _protocol().check()
    with pytest.raises(BenchmarkError) as caught:
        _protocol(input_len=1500, output_len=600).check()
    assert "--max-model-len" in str(caught.value)
    assert "--prompts random" in str(caught.value)
    _protocol(input_len=1500, output_len=600, max_model_len=4096, prompts="random").check()


# processes


def _script(body: str) -> list[str]:
    return [sys.executable, "-u", "-c", body]


def test_a_server_that_exits_shows_why(tmp_path: Path) -> None:
    body = "print('\\n'.join(f'line {i}' for i in range(99))); raise ValueError('no such rank')"
    started = server.start(_script(body), server.free_port(), tmp_path / "server.log")
    began = time.monotonic()
    with pytest.raises(BenchmarkError) as caught:
        server.wait_until_healthy(started, 60)
    assert time.monotonic() - began < 30
    said = str(caught.value)
    assert "exited with status 1" in said
    assert "ValueError: no such rank" in said
    assert str(started.log) in said
    assert "line 3\n" not in said


_ANSWERS = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        print("ValueError: no such rank", flush=True)
        self.send_error(500)

    def do_GET(self):
        if self.path == "/metrics":
            print("RuntimeError: no metrics", flush=True)
            self.wfile.write(b"nonsense\\n\\n")
        else:
            self.send_response(200)
            self.end_headers()

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_fails_a_request_shows_its_log(tmp_path: Path) -> None:
    port = server.free_port()
    started = server.start([*_script(_ANSWERS), str(port)], port, tmp_path / "server.log")
    try:
        server.wait_until_healthy(started, 60)
        with pytest.raises(BenchmarkError, match="/v1/completions answered 500") as caught:
            load.warm_up(started, MODEL, _protocol())
        assert "ValueError: no such rank" in str(caught.value)
        with pytest.raises(BenchmarkError, match="/metrics gave no answer") as caught:
            metrics.read(started)
        assert "RuntimeError: no metrics" in str(caught.value)
        assert str(started.log) in str(caught.value)
    finally:
        server.stop(started.process)
    with pytest.raises(BenchmarkError, match="/metrics gave no answer"):
        metrics.read(started)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    body = "print('still loading'); import time; time.sleep(600)"
    started = server.start(_script(body), server.free_port(), tmp_path / "server.log")
    try:
        with pytest.raises(BenchmarkError, match="not healthy after 2 s") as caught:
            server.wait_until_healthy(started, 2)
        assert "still loading" in str(caught.value)
    finally:
        server.stop(started.process)
    assert started.process.returncode == -signal.SIGTERM


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_stop_ends_its_own_group_and_nothing_else(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    parent = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}]); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    bystander = subprocess.Popen(_script("import time; time.sleep(600)"), start_new_session=True)
    try:
        log = tmp_path / "server.log"
        started = server.start(_script(parent), server.free_port(), log)
        deadline = time.monotonic() + 60
        while not log.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(log.read_text())
        assert os.getpgid(child) == started.process.pid != os.getpgid(0)
        time.sleep(0.5)  # the child installs its signal handler
        server.stop(started.process)
        deadline = time.monotonic() + 10
        while _alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(child)
        assert started.process.returncode is not None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_servers_ignore_what_overrides_their_kv_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert "VLLM_CPU_KVCACHE_SPACE" not in server.environment()
    flags = _protocol(kv_bytes=12345, enforce_eager=False).server_flags()
    assert flags[flags.index("--kv-cache-memory-bytes") + 1] == "12345"
    assert "--enforce-eager" not in flags


def test_a_failing_command_line_is_refused(tmp_path: Path) -> None:
    arguments = ["--dense", MODEL, "--compressed", "dense=x", "--text", TEXT, "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", *map(str, arguments), "--kv-bytes", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "NAME=DIR" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
