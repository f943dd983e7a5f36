"""Paired timing: all kernels in turn, round after round, so that noise hits all alike."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

# Seconds of one kernel in one round.
_ROUND = 0.1
# Of a copy, far beyond any cache.
_COPIED = 1 << 28


def alternate(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
) -> list[list[float]]:
    """Seconds of one call of each, [calls][rounds]."""
    repeats = []
    for call in calls:
        call()  # compiles
        repeats.append(max(1, round(_ROUND / _seconds(call, device, 1))))
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for seconds, call, count in zip(found, calls, repeats, strict=True):
            seconds.append(_seconds(call, device, count))
    return found


def _seconds(call: Callable[[], object], device: torch.device, count: int) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - started) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that this machine copies, those read and those written both counted."""
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    times = [_seconds(lambda: target.copy_(source), device, 3) for _ in range(5)]
    return 2 * _COPIED / median(times)


def matrix_speeds(device: torch.device) -> dict[str, float]:
    """Operations per second of a matrix product, by dtype.

    Kernels on a CPU multiply in fp32, and in bf16 where there are units for it, and only there is
    torch's product in bf16 the faster one. On a GPU they multiply in the model's dtype.
    """
    if device.type == "cuda":
        return {"bfloat16": _matrix_speed(device, torch.bfloat16, 8192)}
    return {
        "float32": _matrix_speed(device, torch.float32, 1024),
        "bfloat16": _matrix_speed(device, torch.bfloat16, 1024),
    }


def _matrix_speed(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left = torch.ones(size, size, device=device, dtype=dtype)
    times = [_seconds(lambda: left @ left, device, 3) for _ in range(5)]
    return float(2 * size**3 / min(times))
