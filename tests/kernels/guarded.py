"""Run the compiled kernels on tensors behind which memory may be neither read nor written.

A process of its own runs this: what touches a page behind ends it by a signal.
"""

import ctypes
import itertools
import mmap
from typing import Any

import paged_cases
import torch
from paged_cases import Case

from vllm_svd.kernels import native
from vllm_svd.kernels.latent_attention import compiled, packed
from vllm_svd.kernels.latent_layout import LatentLayout
from vllm_svd.kernels.latent_store import compiled as store
from vllm_svd.kernels.paged_batch import Rope

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_kept = []


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that ends where a page begins that is not there."""
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + whole), mmap.PAGESIZE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    _kept.append(memory)
    place = (ctypes.c_char * size).from_address(start + whole - size)
    copy = torch.frombuffer(place, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def at_the_end(case: Case) -> Case:
    """The case with the last page of its last request behind all others, and all of it guarded."""
    table, pages = case.batch.block_table.clone(), case.cache.clone()
    blocks = -(-int(case.batch.seq_lens[-1]) // pages.shape[2])
    page, last = int(table[-1, blocks - 1]), len(pages) - 1
    pages[[page, last]] = pages[[last, page]]
    moved = table.clone()
    moved[table == page], moved[table == last] = last, page
    case.batch.block_table.copy_(moved)
    settings = dict(case.settings)
    for name in ("k_up", "v_up"):
        settings[name] = None if settings[name] is None else guarded(settings[name])
    if rope := settings["rope"]:
        longest = int(case.batch.seq_lens.max())
        settings["rope"] = Rope(guarded(rope.cos_sin[:longest]), rope.is_neox)
    return Case(guarded(case.query), guarded(pages), case.batch, settings)


def attend(*lengths: tuple[int, int], **shape: Any) -> None:
    last = {16: 96, 24: 72}[shape["block"]]  # whole pages; of the latter whole vectors are not
    lengths = lengths or ((1, 5), (3, 40), (1, last))
    case = at_the_end(paged_cases.build([*lengths], **shape))
    output = guarded(torch.full(case.shape, torch.nan, dtype=case.query.dtype))
    assert compiled.attend(case.query, case.cache, case.batch, output, **case.settings)
    assert output.isfinite().all(), shape


def project(layout: LatentLayout, dtype: torch.dtype, width: int) -> None:
    key, value = (guarded(torch.randn(3, 2, width).to(dtype)) for _ in range(2))
    bases = [torch.randn(2, rank, width) for rank in (layout.k_rank, layout.v_rank)]
    down = tuple(guarded(basis.to(dtype)) for basis in bases)
    slot = torch.uint8 if layout.quantised else dtype
    cache = guarded(torch.zeros(2, 2, 8, layout.width, dtype=slot))
    slots = guarded(torch.tensor([3, 9, 15]))  # the last slot of all
    assert store.store(key, value, cache, slots, layout, down)


def scratch(size: int) -> int:
    return guarded(torch.zeros(size, dtype=torch.uint8)).data_ptr()


def main() -> None:
    torch.set_num_threads(2)
    native.scratch, packed._placed = scratch, guarded
    tiers = ((4, "fp8_e4m3"), (8, "int4"), (4, "int2")), ((20, "int8"), (12, "int2"))
    words = ((8, "int8"), (16, "int4"), (24, "int2")), ((20, "int8"), (8, "int4"))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for mode, dtype, block in itertools.product(("pre", "post"), dtypes, (16, 24)):
        shape = {"mode": mode, "dtype": dtype, "block": block, "projects": True}
        for ranks in ((13, 7), (16, 16), (32, 48)):
            attend(k_rank=ranks[0], v_rank=ranks[1], d=48, **shape)
        attend(tiers=tiers, **shape)
        attend(mode=mode, dtype=dtype, block=block, window=9, neox=False)
        attend((1, 5), (2, 48), **shape)  # three vectors of positions, where the table ends
        attend((200, 300), (1, 20), kv_heads=4, shared=2, tiers=words, **shape)
        attend((1, 1500), kv_heads=4, shared=4, tiers=words, **shape)
    found = paged_cases.build([(1, 1)], tiers=tiers).settings["layout"]
    for layout, dtype in itertools.product((LatentLayout(13, 7), found), dtypes):
        project(layout, dtype, 24)


if __name__ == "__main__":
    main()
