"""Machine code of latent_store: a token's key and value of one group from model to slot."""

import numpy as np
from numba import carray

from vllm_svd.kernels.latent_store.compiled import FIELDS
from vllm_svd.kernels.native.codec import encode
from vllm_svd.kernels.native.entry import entry
from vllm_svd.kernels.native.memory import address, compiled, count_up, ints, narrow, widen
from vllm_svd.kernels.native.products import times

CALL = np.dtype([(name, np.int64) for name in FIELDS])


@compiled
def _latent(c, source, down, group, rank, base):
    """To the scratch, in fp32: the latent at `source`, or of what is there, rounded as a product.

    That is what operators would give, whose results are of the model's dtype.
    """
    if c.width == 0:
        widen(c.kind, source, rank, base + c.s_latent)
        return
    widen(c.kind, source, c.width, base + c.s_row)
    stride = c.width * c.down_item
    basis = down + group * rank * stride
    spare = base + c.s_spare
    times(basis, c.down_kind, stride, rank, c.width, base + c.s_row, base + c.s_latent, spare)
    narrow(c.kind, base + c.s_latent, rank, spare)
    widen(c.kind, spare, rank, base + c.s_latent)


@compiled
def _run(c, threads, begun):
    base = c.scratch + count_up(threads) * c.scratch_stride
    slots, size, latent = ints(c.slots), c.block_size, base + c.s_latent
    tables = (c.bounds, c.scales, c.largest, c.tried)
    item = count_up(begun)
    while item < c.tokens * c.groups:
        token, group = divmod(item, c.groups)
        slot = slots[token]
        if slot >= 0:
            row = c.cache + slot // size * c.cache_stride_0 + group * c.cache_stride_1
            row += slot % size * c.cache_stride_2
            key = c.key + token * c.key_stride_0 + group * c.key_stride_1
            value = c.value + token * c.value_stride_0 + group * c.value_stride_1
            _latent(c, key, c.k_down, group, c.k_rank, base)
            if c.k_num_runs:
                encode(latent, c.k_runs, c.k_num_runs, tables, row)
            else:
                narrow(c.cache_kind, latent, c.k_rank, row)
            _latent(c, value, c.v_down, group, c.v_rank, base)
            if c.v_num_runs:
                encode(latent, c.v_runs, c.v_num_runs, tables, row)
            else:
                narrow(c.cache_kind, latent, c.v_rank, row + c.k_rank * c.cache_item)
        item = count_up(begun)


@entry
def store(arguments):
    """What every thread of the team runs; `arguments` is the address of a CALL."""
    counts = address(arguments)
    _run(carray(arguments, (1,), dtype=CALL)[0], counts, counts + 8)
