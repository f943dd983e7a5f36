"""Arguments and sizes that the compiled attention and its caller share."""

import functools
import struct
from typing import Any

from vllm_svd.kernels import native

TILE = 64  # tokens whose latents are decoded, and keys rebuilt, at a time
ITEMS_PER_THREAD = 4
# Items a thread from which heads that share a latent are better read together than shared out.
ENOUGH_PER_THREAD = 2
TOKENS_AT_ONCE = 4  # query tokens whose values are mixed by one product
PLAN_COLUMNS = 8
# All but the first two are integers: addresses, sizes, strides in bytes; `s_` are offsets in the
# scratch of a thread, of which the first begins at `threads_scratch`. Those of a call are followed
# by those of the batch, of the layer and of the memory for both, which are packed once, and by
# counters: of threads, of items begun, of the parts finished of each head and run.
_CALL = """
query output scratch
"""
_BATCH = """
num_requests query_start_loc seq_lens tables table_stride
"""
_LAYER = """
kv_heads query_block least_part window block_size
cache cache_kind cache_item cache_stride_0 cache_stride_1 cache_stride_2 cache_end
slot_bytes slot_stride reads key_words
k_runs k_num_runs v_runs v_num_runs scale_table v_begins v_tables v_vectors
query_kind query_stride_0 query_stride_1 query_width
output_kind output_stride_0 output_stride_1
shared group width k_rank v_rank
up up_stride_0 up_stride_1 rebuilt paired by_matrix num_pairs spans num_spans order in_order angles
v_up v_up_stride_0 v_width
"""
_MEMORY = """
max_rows max_runs max_states num_threads threads_scratch scratch_stride
query_stride key_stride value_stride
s_query s_result s_slots s_words s_rows s_latents s_scales s_quotients s_keys s_sums s_v
s_weights s_mixed s_highest s_total s_row
"""
CALL, BATCH, LAYER, MEMORY = (tuple(names.split()) for names in (_CALL, _BATCH, _LAYER, _MEMORY))
FIELDS = ("scale", "soft_cap", *CALL, *BATCH, *LAYER, *MEMORY)
pack_call = struct.Struct(f"2d{len(CALL)}q").pack


@functools.cache
def team() -> Any:
    """The compiled C function of the address of packed arguments; compiled or loaded at first."""
    from vllm_svd.kernels.latent_attention import native_team

    return native.c_function(native_team.team)
