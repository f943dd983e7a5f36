"""The console entry, run in this process."""

import signal
import sys

import pytest

from offline_compress import cli

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
