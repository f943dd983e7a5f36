"""No compiled kernel reads or writes behind what it is given."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_svd.kernels import native

SCRIPT = Path(__file__).with_name("guarded.py")
TOUCH = """
import ctypes, guarded, torch
tensor = guarded.guarded(torch.zeros(5))
ctypes.c_float.from_address(tensor.data_ptr() + 20).value
"""


@pytest.mark.skipif(not native.is_there(), reason="needs numba")
def test_nothing_behind_a_tensor_is_touched():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_touches_it_ends():
    done = subprocess.run(
        [sys.executable, "-c", TOUCH], cwd=SCRIPT.parent, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGSEGV
