"""The command line: every bad input gives one message and exit code 1, never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from offline_compress import cli
from vllm_svd import __version__

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_run_inspect_evaluate_and_restore(invoke, model, recipe, short_text, tmp_path):
    out, dense = tmp_path / "out", tmp_path / "dense"
    code, output, _ = invoke(
        *("run", model, out, "--recipe", recipe, "--text", short_text),
        *("--method", "asvd", "--kept", "0.5", "--kv-kept", "0.25", "--kv-mode", "post"),
        *("--seed", "3", "--samples", "5", "--device", "cpu", "--allocator", "truncation_loss"),
    )
    assert code == 0
    assert f"vllm serve {out}" in output

    code, output, _ = invoke("inspect", out, "--json")
    found = json.loads(output)
    assert (code, found["method"]) == (0, "asvd")
    matrices = found["plan"]["matrices"].values()
    ranks = {matrix["module"]["rank"] for matrix in matrices if matrix["module"]}
    assert not ranks <= {16, 21, 22}  # measured for every matrix: these are those of uniform
    assert found["measured"]["kl_to_dense"] > 0
    caches = found["plan"]["caches"]
    modes = {
        (cache["projection"]["mode"], cache["projection"]["k_rank"]) for cache in caches.values()
    }
    assert modes == {("post", 8)}
    code, output, _ = invoke("inspect", out)
    assert code == 0
    assert "verified" in output

    scores = {}
    for directory in (model, out):
        code, output, _ = invoke(
            "evaluate", directory, "--text", short_text, "--context", "64", "--json"
        )
        assert code == 0
        scores[directory] = json.loads(output)
        assert scores[directory]["context"] == 64
    assert scores[out]["perplexity"] != scores[model]["perplexity"]
    assert scores[out]["tokens"] == scores[model]["tokens"]

    code, output, _ = invoke("restore", out, dense)
    assert code == 0
    assert "cannot hold K/V projections; 2 were dropped" in output
    assert invoke("evaluate", dense, "--text", short_text, "--context", "64")[0] == 0


def test_run_prints_the_caches_that_were_decided_by_measuring(
    invoke, model, recipe, short_text, tmp_path
):
    options = ["--recipe", recipe, "--text", short_text, "--kv-only", "--device", "cpu"]
    options += ["--kv-kept", "0.15", "--kv-store", "tiers", "--kv-allocator", "measured"]
    code, planned, _ = invoke("plan", model, *options)
    assert code == 0 and "geometric spectrum" in planned
    code, output, _ = invoke("run", model, tmp_path / "out", *options)
    assert code == 0
    _, inspected, _ = invoke("inspect", tmp_path / "out")
    shown = [row for row in output.splitlines() if "self_attn" in row]
    assert len(shown) == 2 and all("int8" in row for row in shown)
    assert set(shown) <= set(inspected.splitlines())
    assert not set(shown) <= set(planned.splitlines())


def test_plan_reads_headers_only(invoke, model, tmp_path):
    # the header stays, every weight is gone
    shard = model / "model.safetensors"
    size = shard.stat().st_size
    header = int.from_bytes(shard.read_bytes()[:8], "little") + 8
    os.truncate(shard, header)
    os.truncate(shard, size)
    code, output, _ = invoke("plan", model, "--kept", "0.6", "--kv-kept", "0.25")
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in output
    assert "64 of 256" not in output  # fp32: 2 heads x 2 x 8 channels x 4 bytes
    assert "128 of 512" in output
    assert not (tmp_path / "out").exists()


def test_the_version_and_the_help(invoke):
    assert invoke("--version")[:2] == (0, f"offline-compress {__version__}\n")
    code, output, _ = invoke("run", "--help")
    assert code == 0
    assert "--kv-kept" in output


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("squash",), ("run", "a", "b", "--kept", "half"), ("run", "a", "b", "--nope")],
)
def test_usage_errors_exit_with_2(invoke, arguments):
    code, _, errors = invoke(*arguments)
    assert code == 2
    assert "Traceback" not in errors


def test_a_missing_model(refused, tmp_path):
    for name in ("./absent", str(tmp_path / "absent"), "~/absent-model", "a/b/c"):
        assert "no such directory" in refused(source=name)


def test_a_model_that_is_a_file(refused, recipe):
    assert "is a file" in refused(source=recipe)


def test_a_directory_without_a_config(refused, model):
    (model / "config.json").unlink()
    assert "holds no config.json" in refused()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_malformed_config(refused, model, content):
    (model / "config.json").write_text(content)
    assert "config.json" in refused()


def test_an_unsupported_architecture(refused, model):
    edit_config(model, architectures=["OPTForCausalLM"])
    errors = refused()
    assert "OPTForCausalLM is not supported" in errors
    assert "Qwen3ForCausalLM" in errors


def test_a_compressed_and_a_quantised_model(refused, model):
    edit_config(model, quantization_config={"quant_method": "svd"})
    assert "already compressed" in refused()
    edit_config(model, quantization_config={"quant_method": "gptq"})
    assert "is quantised (gptq)" in refused()


def test_pickles_are_never_loaded(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    errors = refused()
    assert "pytorch_model.bin" in errors
    assert "pickles are never loaded" in errors


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_a_truncated_shard(refused, model, length):
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    assert "model.safetensors is damaged" in refused()


def test_missing_and_misshapen_tensors_are_all_named(refused, model):
    held = load_file(model / "model.safetensors")
    del held["model.layers.0.mlp.up_proj.weight"]
    held["model.norm.weight"] = held["model.norm.weight"][:7].clone()
    save_file(held, model / "model.safetensors")
    errors = refused()
    assert "model.layers.0.mlp.up_proj.weight: missing" in errors
    assert "model.norm.weight: shape [7], config.json makes it [64]" in errors


def test_weights_that_are_not_finite(refused, model):
    held = load_file(model / "model.safetensors")
    held["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    assert "the input of model.layers.1.self_attn.o_proj is NaN" in refused()


def test_a_missing_tokenizer(refused, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused()


def test_no_text(refused):
    assert "calibration.text (--text): missing" in refused(text=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"caf\xe9", "UTF-8"), (b"short", "need 384")],
)
def test_a_bad_text(refused, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert message in refused(text=path)


def test_a_text_that_cannot_be_read(refused, tmp_path):
    assert "cannot be read" in refused(text=tmp_path / "absent.txt")
    assert "cannot be read" in refused(text=tmp_path)


def test_an_existing_output(refused, model):
    assert "already exists" in refused(out=model)
    assert "is not a directory" in refused(out=model / "config.json" / "out")


def test_bad_values_name_their_flags(refused):
    errors = refused("--kept", "1.5", "--method", "magic", "--samples", "0")
    for flag in ("--kept", "--method", "--samples"):
        assert flag in errors


def test_nothing_to_compress(refused):
    assert "would stay dense" in refused("--kept", "1", "--kv-kept", "1")


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in refused("--device", "cuda")


def test_a_context_beyond_the_model(refused, recipe):
    recipe.write_text("calibration: {context: 4096}")
    assert "4096 exceeds the model's 512 positions" in refused()


def test_inspect_evaluate_and_restore_refuse_what_is_not_theirs(
    invoke, model, short_text, tmp_path
):
    for arguments in (
        ("inspect", model),
        ("inspect", tmp_path / "absent"),
        ("restore", model, tmp_path / "dense"),
        ("merge", tmp_path / "dense", tmp_path / "absent", "--base", model),
        ("evaluate", tmp_path / "absent", "--text", short_text),
        ("evaluate", model, "--text", tmp_path / "absent.txt"),
    ):
        code, output, errors = invoke(*arguments)
        assert (code, output) == (1, "")
        assert errors.startswith("error: ")
        assert "Traceback" not in errors
    assert not (tmp_path / "dense").exists()


def test_debug_shows_the_error_itself(monkeypatch, tmp_path):
    monkeypatch.setenv(cli.DEBUG, "1")
    monkeypatch.setattr(sys, "argv", ["offline-compress", "inspect", str(tmp_path / "absent")])
    with pytest.raises(cli.SvdError):
        cli.main()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_killed_run_leaves_what_the_next_one_takes_up(
    invoke, tiny_checkpoint, short_text, recipe, tmp_path, number
):
    recipe.write_text("calibration: {samples: 20, context: 64, batch: 1}\n")
    # The suite itself may run under nohup, which children inherit.
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code += "; from offline_compress import cli; cli.main()"
    marker = tmp_path / "errors.txt"
    with marker.open("w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", code, "run"),
                *(tiny_checkpoint("llama"), tmp_path / "out"),
                *("--recipe", recipe, "--text", short_text),
            ],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while not list(tmp_path.glob(".out.work/*/lock")):
            assert process.poll() is None, marker.read_text()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=120) == 128 + number
    assert "Traceback" not in marker.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "errors.txt", ".out.work"}
    command = ("run", tiny_checkpoint("llama"), tmp_path / "out", "--recipe", recipe)
    code, _, errors = invoke(*command, "--text", short_text)
    assert code == 0
    assert "note:" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "errors.txt", "out"}


def test_nohup_stays_in_force(monkeypatch):
    monkeypatch.setattr(cli.signal, "signal", lambda number, _: installed.append(number))
    installed = []
    monkeypatch.setattr(cli.signal, "getsignal", lambda _: signal.SIG_IGN)
    cli.exit_on_signals()
    assert sorted(installed) == sorted((signal.SIGTERM, signal.SIGINT))


def test_what_a_killed_run_left_is_named_and_stays(invoke, model, recipe, short_text, tmp_path):
    partial, work = tmp_path / ".out.0123abcd.partial", tmp_path / ".out.work" / "0123abcd"
    for left in (partial, work):
        left.mkdir(parents=True)
        (left / "half.safetensors").write_bytes(b"x" * 1234)
    command = ("run", model, tmp_path / "out", "--recipe", recipe, "--text", short_text)
    code, _, errors = invoke(*command)
    assert code == 0
    for left in (partial, work):
        assert f"{left} (1,234 bytes)" in errors
        assert left.is_dir()
    assert [path.name for path in work.parent.iterdir()] == ["0123abcd"]
