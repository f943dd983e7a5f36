"""The benchmark of the kernels, through its command line."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.kernels.__main__ import main
from benchmarks.kernels.geometry import VARIANTS

app = typer.Typer()
app.command()(main)


@pytest.mark.parametrize("flags", [[], ["--prompts"]], ids=["decode", "prompts"])
def test_every_cache_is_timed_beside_the_dense_one(tmp_path, flags):
    out = tmp_path / "new" / "kernels.json"
    shape = ["--geometry", "wiki-llama-s", "--batch", "2", "--context", "40", "--rounds", "1"]
    done = CliRunner().invoke(app, [*shape, *flags, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["machine"]["cores"] > 0 and found["bandwidth"] > 0
    speeds = found["matrix_speeds"]
    assert found["matrix_speed"] == speeds[found["matrix_dtype"]] == max(speeds.values()) > 0
    rows = found["rows"]
    names = ["dense", *(variant.name for variant in VARIANTS)]
    assert [row["kernel"] for row in rows] == names
    for name, row in zip(names, rows, strict=True):
        assert name in done.output
        (seconds,), (ratio,) = row["seconds"], row["times_dense"]
        assert ratio == rows[0]["seconds"][0] / seconds
        asked = {"geometry": "wiki-llama-s", "batch": 2, "context": 40}
        assert row.items() >= (asked | {"queries": 40 if flags else 1}).items()
        shares = row["bandwidth_share"], row["matrix_share"]
        assert shares[0] == pytest.approx(row["bytes"] / seconds / found["bandwidth"])
        assert shares[1] == pytest.approx(row["operations"] / seconds / found["matrix_speed"])
    # Keys and values of 2 heads of 64 channels, 2 bytes each; half of them; of these 4 bits each
    # and a word for each head, of which two bytes are scales.
    expected = {"dense": 512, "post 0.5": 256, "post 0.5 int4": 64 + 8}
    sizes = {row["kernel"]: row["bytes"] / 80 for row in rows}
    assert sizes.items() >= expected.items()


def test_a_geometry_that_is_not_known_is_refused_with_those_that_are():
    refused = CliRunner().invoke(app, ["--geometry", "gpt"])
    assert refused.exit_code == 2 and "qwen3-0.6b" in refused.output
