"""`python -m benchmarks.kernels.instructions`: what decode attention has a GPU issue, without one.

The Triton kernel of each variant is compiled for an H100 or H200, and its machine code read. The
loop over keys issues so many instructions per warp and tile; four schedulers of a processor take
one each in a cycle. Beside it stands how many cycles the bytes of the same keys take. The larger
one is a floor: what waits for memory, barriers or tensor cores is not counted.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernels.geometry import GEOMETRIES, VARIANTS, Step, Variant
from benchmarks.kernels.kernels import cached_bytes, latent_arguments

CAPABILITY = 90
PROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.7e9
BANDWIDTH = 4.3e12  # bytes per second that an H200 reads in practice
_TOOLS = Path(nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


@dataclass(frozen=True)
class Issued:
    """Of one variant: resources of a program, and cycles of a processor for one key and head."""

    kernel: str
    registers: int
    spilled: int
    shared_memory: int
    instructions: int
    issue_cycles: float
    byte_cycles: float
    times_dense: float
    """At most: cycles of a dense cache's bytes over the larger of the two."""


class _Absent:
    """Stands for the driver of a GPU that nothing is launched on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0


@contextmanager
def _compiling(kernel: Any, found: list[Any]) -> Iterator[None]:
    """Launches of a kernel only compile it."""
    compile_and_launch = kernel.run

    def run(*args: Any, **options: Any) -> Any:
        found.append((compile_and_launch(*args, **(options | {"warmup": True})), options["TILE"]))

    driver.set_active(_Absent())
    kernel.run = run
    try:
        yield
    finally:
        del kernel.run


def issued(variant: Variant, geometry: str = "llama-3.1-8b") -> Issued:
    """Compile a decode step of one variant in bf16."""
    from vllm_svd.kernels.latent_attention import triton as kernels

    step = Step(GEOMETRIES[geometry], 1, 4096, 1, torch.bfloat16, torch.device("cpu"))
    arguments = latent_arguments(step, variant)
    found: list[Any] = []
    with _compiling(kernels._attention_kernel, found):
        kernels.attend(**arguments)
    ((kernel, tile),) = found
    resources, code = _disassembled(kernel.asm["cubin"])
    instructions = len(_loop(code))
    registers, stack, local = map(int, _RESOURCES.search(resources).groups())  # type: ignore[union-attr]
    bytes_per_cycle = BANDWIDTH / PROCESSORS / CLOCK
    issue = instructions * kernel.metadata.num_warps / SCHEDULERS / tile
    keys = step.context * step.geometry.kv_heads
    read = cached_bytes(step, arguments["kv_cache"]) / keys / bytes_per_cycle
    dense = step.dense_bytes() / keys / bytes_per_cycle
    return Issued(
        variant.name,
        registers,
        stack + local,
        kernel.metadata.shared,
        instructions,
        issue,
        read,
        dense / max(issue, read),
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (
            subprocess.run(
                [_TOOLS / "cuobjdump", option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    return resources, code


def _loop(code: str) -> list[str]:
    """The instructions of the longest loop."""
    placed = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(code)]
    longest: list[str] = []
    for end, text in placed:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) <= end:
            body = [other for at, other in placed if int(jump[1], 16) <= at <= end]
            longest = max(longest, body, key=len)
    return longest


def main(
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON of every figure")] = None,
) -> None:
    """Registers, instructions and cycles of decode attention in Llama-3.1-8B's geometry."""
    rows = [issued(variant) for variant in VARIANTS]
    table = Table(title=f"sm_{CAPABILITY}, Triton {triton.__version__}, cycles of a key and head")
    for column in (
        "kernel",
        "registers",
        "spilled",
        "shared",
        "issue",
        "bytes",
        "x dense, at most",
    ):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        table.add_row(
            row.kernel,
            str(row.registers),
            str(row.spilled),
            str(row.shared_memory),
            f"{row.issue_cycles:.1f}",
            f"{row.byte_cycles:.1f}",
            f"{row.times_dense:.2f}",
        )
    Console(width=110).print(table)
    if out is not None:
        found = {
            **{"command": "python -m benchmarks.kernels.instructions", "capability": CAPABILITY},
            **{"triton": triton.__version__, "clock": CLOCK, "bandwidth": BANDWIDTH},
            "rows": [asdict(row) for row in rows],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
