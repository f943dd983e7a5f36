"""A compressed checkpoint is complete or absent: failing, damaged and killed runs."""

import signal
import subprocess
import sys
import textwrap

import pytest
from runs import recipe_for

from offline_compress.pipeline import compress
from offline_compress.workspace import work_root


def script(body, *arguments):
    """A process of its own, for signals and resource limits."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_recipe(directory, text=None):
    path = directory / "recipe.yaml"
    path.write_text(recipe_for(text or "unset", kept=0.6).yaml())
    return path


def test_the_output_is_complete_or_absent_at_every_moment(tiny_checkpoint, short_text, tmp_path):
    """A work directory is there from the first moment, so what cannot be written is found early."""
    seen = []

    def watch(stage, done, total):
        staged = len(list(tmp_path.glob(".out.*.partial")))
        seen.append((stage, done, total))
        assert not (tmp_path / "out").exists()
        assert len(list(work_root(tmp_path / "out").iterdir())) == 1
        assert staged == (stage == "write")

    compress(
        recipe_for(short_text, kept=0.6), str(tiny_checkpoint("llama")), tmp_path / "out", watch
    )
    blocks = [("compress", done, 2) for done in (0, 1, 2)]
    assert seen == [*blocks, ("write", 0, 1), ("write", 1, 1)]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_damaged_source_shard_found_while_writing_leaves_nothing(
    tiny_checkpoint, short_text, tmp_path
):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())

    def damage(stage, done, _total):
        if (stage, done) == ("write", 0):
            shard = source / "model.safetensors"
            shard.write_bytes(shard.read_bytes()[:5000])

    with pytest.raises(Exception, match="cannot be read"):
        compress(recipe_for(short_text, kept=0.6), str(source), tmp_path / "out", damage)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("limit", "message", "left"),
    [(1_000_000, "it needs", {".out.work"}), (100_000, "the disk is full", set())],
)
def test_a_failing_write_says_so_and_leaves_nothing_but_finished_layers(
    tiny_checkpoint, short_text, tmp_path, limit, message, left
):
    """The limit makes the kernel refuse a write half-way, as a full disk does.

    The shard is 1.4 MB, what a block becomes 200 kB.
    """

    def run(limit, change=""):
        return script(
            f"""
            import resource, sys
            from offline_compress import cli
            from offline_compress.sweep import Sweep
            {change}
            limit = int(sys.argv.pop(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            cli.main()
            """,
            *(limit, "run", tiny_checkpoint("llama"), tmp_path / "out", "--text", short_text),
            *("--samples", "2", "--recipe", write_recipe(tmp_path)),
        )

    process = run(limit)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert f"cannot be written: {message}" in errors
    assert "File too large" in errors
    assert output == ""
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"} | left
    assert ("What was computed waits" in errors) == bool(left)
    if left:  # the same command goes on from there: no block is written again
        blocks = {path.name for path in work_root(tmp_path / "out").glob("*/*")}
        assert blocks == {"block-0.safetensors", "block-1.safetensors"}
        again = run(100_000_000, "Sweep._compress = None  # whoever calls it fails")
        _, errors = again.communicate(timeout=300)
        assert again.returncode == 0, errors
        assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out"}


def test_a_run_killed_while_it_writes_leaves_only_what_it_computed(
    tiny_checkpoint, short_text, tmp_path
):
    """Nothing is half-written; the blocks wait for the next run."""
    process = script(
        """
        import sys, time
        from pathlib import Path
        from offline_compress import cli
        from offline_compress.pipeline import compress
        from offline_compress.recipe import load
        def wait(stage, done, total):
            if stage == "write":
                print("writing", flush=True)
                time.sleep(600)
        cli.exit_on_signals()
        recipe, model, out = sys.argv[1:]
        compress(load(Path(recipe)), model, Path(out), wait)
        """,
        *(write_recipe(tmp_path, short_text), tiny_checkpoint("llama"), tmp_path / "out"),
    )
    assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", ".out.work"}
    (work,) = work_root(tmp_path / "out").iterdir()
    records = {path.name for path in work.iterdir()}
    assert records == {"lock", "block-0.safetensors", "block-1.safetensors"}
