"""What a factorisation needs in memory, against the plan."""

import json
import subprocess
import sys

from offline_compress.methods.method import workspace_bytes

PEAKS = """
import ctypes, gc, json, sys
import torch
from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.methods.gfwsvd import Gfwsvd
from offline_compress.methods.svd_llm import SvdLlm
from offline_compress.methods.svd_llm_v2 import SvdLlmV2

METHODS = (SvdLlm(), SvdLlm(update=True), SvdLlmV2(), Gfwsvd())

def status(field):
    rows = open("/proc/self/status").read().splitlines()
    return int(next(row for row in rows if row.startswith(field)).split()[1]) * 1024

def of(m, n):
    x, g = torch.randn(n, n, dtype=torch.float64), torch.randn(m, m, dtype=torch.float64)
    gram, outputs = x.T @ x, g.T @ g
    return torch.randn(m, n), LayerStatistics(gram=gram, shifted_gram=gram, output_gram=outputs)

def peak(method, weight, statistics):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is used again would not be counted
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
    before = status("VmRSS")
    method.factorize(weight, statistics, min(weight.shape) // 2)
    return status("VmHWM") - before

torch.set_num_threads(1)
for small in ((200, 300), (300, 200)):  # libraries allocate at their first call
    for method in METHODS:
        method.factorize(*of(*small), 50)
shapes = json.loads(sys.argv[1])
layers = [of(*shape) for shape in shapes]
print(json.dumps([[[peak(m, *layer) for _ in range(3)] for m in METHODS] for layer in layers]))
"""


def test_the_planned_workspace_is_the_peak_of_a_factorisation():
    shapes = [(400, 800), (800, 400), (600, 600)]
    command = [sys.executable, "-c", PEAKS, json.dumps(shapes)]
    peaks = json.loads(subprocess.check_output(command, text=True))
    for shape, of_shape in zip(shapes, peaks, strict=True):
        planned = workspace_bytes(*shape)
        # What else the process touches adds to a peak, and heap that is used again is not in it.
        assert max(map(max, of_shape)) > 0.5 * planned
        # LAPACK's small buffers, rounded up to pages, come on top of the matrices counted.
        assert max(map(min, of_shape)) < 1.05 * planned
