"""latent_store on CUDA: one program per token and KV head."""

import torch
import triton
import triton.language as tl


@triton.jit
def _store_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slot_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    BLOCK_SIZE: tl.constexpr,
    K_RANK: tl.constexpr,
    V_RANK: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    target = (
        cache_ptr
        + (slot // BLOCK_SIZE) * cache_block_stride
        + head * cache_head_stride
        + (slot % BLOCK_SIZE) * cache_slot_stride
    )
    k = tl.arange(0, K_PADDED)
    source = key_ptr + token * key_token_stride + head * key_head_stride
    tl.store(target + k, tl.load(source + k, mask=k < K_RANK), mask=k < K_RANK)
    v = tl.arange(0, V_PADDED)
    source = value_ptr + token * value_token_stride + head * value_head_stride
    tl.store(target + K_RANK + v, tl.load(source + v, mask=v < V_RANK), mask=v < V_RANK)


def store(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See vllm_svd.kernels.latent_store; channels must be contiguous in all three tensors."""
    _, heads, k_rank = key.shape
    v_rank = value.shape[-1]
    _store_kernel[(slot_mapping.shape[0], heads)](
        key,
        value,
        kv_cache,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        *kv_cache.stride()[:3],
        BLOCK_SIZE=kv_cache.shape[2],
        K_RANK=k_rank,
        V_RANK=v_rank,
        K_PADDED=triton.next_power_of_2(k_rank),
        V_PADDED=triton.next_power_of_2(v_rank),
    )
