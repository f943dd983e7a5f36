"""The console entry, run in this process, and tiny models as the offline stage reads them."""

import json
import shutil
import signal
import sys

import pytest
import torch
from reference_models import tokens_for
from safetensors.torch import load_file, save_file

from offline_compress import cli, kv
from offline_compress.calibration import HOST_LIMIT, Network, Workers
from offline_compress.reference import load
from offline_compress.sweep import open_streams
from offline_compress.weights import open_source
from offline_compress.workspace import Workspace

FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "qwen3", "qwen3_moe")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="session")
def noisy_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model of a family with every parameter, bias and norm random enough to matter."""
    made = {}

    def make(family):
        if family not in made:
            directory = tmp_path_factory.mktemp("noisy") / family
            shutil.copytree(tiny_checkpoint(family), directory)
            generator = torch.Generator().manual_seed(7)
            held = load_file(directory / "model.safetensors")
            for name, parameter in held.items():
                noise = torch.randn(parameter.shape, generator=generator)
                spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                held[name] = parameter * (parameter.ndim == 1) + spread * noise
            save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((directory / "config.json").read_text())
            if family == "mistral":
                config["sliding_window"] = 16  # every layer of Mistral slides
            (directory / "config.json").write_text(json.dumps(config))
            made[family] = directory
        return made[family]

    return make


@pytest.fixture(scope="session")
def network_of():
    """The model of a directory, block by block, on the CPU in fp32."""

    def open_network(directory):
        return Network(open_source(str(directory)), torch.device("cpu"), torch.float32)

    return open_network


@pytest.fixture(scope="session")
def streams_of(tmp_path_factory):
    """Hidden states of token windows before the first block, the last `held_out` of them unseen."""

    def open_windows(network, windows, held_out=0, batch=2, limit=HOST_LIMIT):
        cut = len(windows) - held_out
        return open_streams(
            network,
            windows[:cut],
            windows[cut:],
            batch=batch,
            limit=limit,
            work=Workspace(tmp_path_factory.mktemp("work")),
            workers=Workers(),
        )

    return open_windows


@pytest.fixture(scope="session")
def kv_statistics(streams_of):
    """Of every attention layer by path, in the dense model on token windows."""

    @torch.no_grad()
    def collect(network, windows, mode, batch=2, group=1):
        streams, found = streams_of(network, windows, batch=batch), {}
        for index, path in enumerate(network.paths):
            block, rows = network.block(index), list(streams.every())
            statistics = kv.collect(
                network, index, block, streams.dense, rows, streams, mode, group
            )
            found[f"{path}.self_attn"] = statistics
            for part in rows:
                hidden = streams.dense.read(part, network.device)
                streams.dense.write(part, network.forward(index, block, hidden))
        return found

    return collect


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, noisy_checkpoint):
    return noisy_checkpoint(request.param)


@pytest.fixture(scope="module")
def dense(directory):
    """The whole model at once, in plain transformers."""
    return load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def statistics(dense, directory, network_of, kv_statistics):
    """Of every attention layer of the dense model, by mode of the cache and path."""
    network, windows = network_of(directory), tokens_for(dense, samples=4)
    return {mode: kv_statistics(network, windows, mode) for mode in ("pre", "post")}


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Run the console entry with arguments: (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["offline-compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    yield invoke
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("calibration: {samples: 4, context: 64}\nevaluation: {samples: 2}\n")
    return path


@pytest.fixture
def model(tiny_checkpoint, tmp_path):
    """A copy of the tiny model, to be damaged."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in tiny_checkpoint("llama").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture
def refused(invoke, model, recipe, short_text, tmp_path):
    """Run must fail with this one message and leave nothing: gives the message."""

    def refused(*arguments, source=model, text=short_text, out=tmp_path / "out"):
        before = set(tmp_path.iterdir())
        texts = ("--text", text) if text else ()
        code, output, errors = invoke("run", source, out, "--recipe", recipe, *texts, *arguments)
        assert (code, output) == (1, "")
        assert errors.count("error: ") == 1
        assert "Traceback" not in errors
        assert set(tmp_path.iterdir()) == before
        return errors

    return refused
