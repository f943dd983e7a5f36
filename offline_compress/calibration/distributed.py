"""Processes that share the calibration samples, one device each, joined by torch.distributed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from vllm_svd.errors import SvdError

# The first process writes the checkpoint while the others wait for it.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Workers:
    """This process among `size` of them; alone unless torch.distributed is initialised.

    Every worker reads its share of the samples and sums moments; after `sum` all of them hold the
    same totals bit for bit. Each makes factors of them, and takes those of the first: what a GPU
    makes of the same totals may differ in the last bits.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "Workers":
        """The workers of this run, as torchrun started them."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, samples: int) -> slice:
        """This worker's samples, contiguous and as even as can be."""
        return slice(self.rank * samples // self.size, (self.rank + 1) * samples // self.size)

    def sum(self, total: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its sum over all workers."""
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its largest entries over all workers."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the first worker, of the same shape and dtype everywhere."""
        if self.size == 1:
            return tensor
        held = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(held.flatten().view(torch.uint8), 0)  # gloo has no transport of bf16
        return held

    def text_of_first(self, text: str) -> str:
        """The text of the first worker."""
        if self.size == 1:
            return text
        said = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = int(self.of_first(torch.tensor([len(said)])))
        held = said if self.first else torch.empty(length, dtype=torch.uint8)
        return bytes(self.of_first(held).tolist()).decode()

    def wait(self) -> None:
        """Until every worker is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[Workers]:
    """Join the processes that torchrun started, for as long as the block runs.

    Alone where WORLD_SIZE is not in the environment. On CUDA, unless `device` is cpu, each process
    takes the GPU of its local rank. Raises SvdError where it has none, or where torchrun's other
    variables are missing.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Workers()
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise SvdError(
                f"torchrun started more than the {gpus} processes that this machine has GPUs for\n"
                "Remedy: lower --nproc-per-node, or give --device cpu"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except ValueError as error:
        raise SvdError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and the processes cannot meet: {error}\n"
            "Remedy: start them with torchrun, or unset WORLD_SIZE"
        ) from None
    try:
        yield Workers.joined()
    finally:
        dist.destroy_process_group()
