"""What the Triton kernels are for a GPU, which Triton compiles for where there is none."""

import json
import os
import subprocess
import sys

from benchmarks.kernels.geometry import VARIANTS


def test_decode_kernels_keep_their_registers_and_are_not_bound_by_instructions(tmp_path):
    """Nothing spills; without quantisation a key is issued faster than its bytes are read."""
    out = tmp_path / "instructions.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.instructions", "--out", str(out)],
        env=environment,
        check=True,
        capture_output=True,
    )
    rows = {row["kernel"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [variant.name for variant in VARIANTS]
    assert not any(row["spilled"] for row in rows.values())
    for name in ("post 0.5", "pre 0.5"):
        assert rows[name]["issue_cycles"] < rows[name]["byte_cycles"]
