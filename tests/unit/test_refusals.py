"""Plans that vLLM could not serve are refused with what is accepted and the remedy."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_svd.attention import layer as attention
from vllm_svd.errors import SvdError, UnsupportedModelError
from vllm_svd.format import KVProjection, SvdCheckpointConfig
from vllm_svd.kernels import native as machine_code
from vllm_svd.quantization import config as quantization


def projection(
    k_rank: int = 32, v_rank: int = 32, mode: str = "pre", heads: int = 2, group: int = 1
) -> Any:
    shape = {"num_kv_heads": heads, "head_dim": 64, "group": group}
    return KVProjection(mode=mode, k_rank=k_rank, v_rank=v_rank, **shape)


def served(projection: KVProjection) -> quantization.SvdConfig:
    return quantization.SvdConfig(SvdCheckpointConfig(method="svd", kv={"layer": projection}))


@pytest.mark.parametrize(("heads", "size"), [(2, 3), (4, 3), (3, 2), (6, 4)])
def test_kv_heads_that_ranks_cannot_share(monkeypatch, heads, size):
    monkeypatch.setattr(quantization, "get_tensor_model_parallel_world_size", lambda: size)
    with pytest.raises(UnsupportedModelError, match=rf"{heads} KV heads.*size {size}") as refused:
        served(projection(heads=heads)).get_quant_method(torch.nn.Linear(1, 1), "layer.attn")
    assert "--tensor-parallel-size" in str(refused.value)


@pytest.mark.parametrize(
    ("heads", "size", "group"),
    [(2, 1, 1), (2, 2, 1), (2, 4, 1), (8, 4, 1), (2, 1, 2), (8, 4, 2), (8, 2, 4)],
)
def test_kv_heads_that_ranks_can_share(monkeypatch, heads, size, group):
    monkeypatch.setattr(quantization, "get_tensor_model_parallel_world_size", lambda: size)
    config = served(projection(heads=heads, group=group))
    assert config.get_quant_method(torch.nn.Linear(1, 1), "layer.attn") is None


@pytest.mark.parametrize(("heads", "size", "group"), [(2, 2, 2), (8, 4, 4), (4, 8, 2)])
def test_latents_that_ranks_would_take_apart(monkeypatch, heads, size, group):
    monkeypatch.setattr(quantization, "get_tensor_model_parallel_world_size", lambda: size)
    with pytest.raises(UnsupportedModelError, match=rf"{group} of its {heads} KV heads") as refused:
        served(projection(heads=heads, group=group)).get_quant_method(
            torch.nn.Linear(1, 1), "layer.attn"
        )
    assert "kv.group" in str(refused.value)


def layer(backend: str = "FLASH_ATTN", **changes: Any) -> Any:
    impl = SimpleNamespace(alibi_slopes=None, sinks=None, logits_soft_cap=0, scale=0.125)
    values: dict[str, Any] = {
        "layer_name": "model.layers.0.self_attn.attn",
        "impl": impl,
        "attn_backend": SimpleNamespace(
            get_name=lambda: backend, supports_head_size=lambda size: size % 8 == 0
        ),
        "kv_cache_dtype": "auto",
        "kv_cache_torch_dtype": torch.bfloat16,
        "dtype": torch.bfloat16,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize("ranks", [(20, 32), (32, 12), (5, 5)])
def test_ranks_that_cuda_does_not_serve(ranks):
    with pytest.raises(UnsupportedModelError, match="multiples of 8") as refused:
        attention._refuse_ranks(layer(), projection(*ranks))
    assert "kv.rank_multiple: 8" in str(refused.value)
    attention._refuse_ranks(layer("CPU_ATTN"), projection(*ranks))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_cache_dtype": "fp8", "kv_cache_torch_dtype": torch.uint8}, "KV cache dtype fp8"),
        ({"attn_type": "encoder"}, "attention of type encoder"),
        ({"kv_sharing_target_layer_name": "other"}, "shared between layers"),
    ],
)
def test_attention_that_latents_do_not_cover(changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        attention._refuse_unsupported(layer(**changes), projection())


def test_every_refusal_is_listed():
    odd = layer(kv_cache_dtype="fp8", kv_cache_torch_dtype=torch.uint8)
    odd.impl.sinks = torch.zeros(1)
    odd.impl.alibi_slopes = torch.zeros(1)
    with pytest.raises(UnsupportedModelError) as refused:
        attention._refuse_unsupported(odd, projection())
    for named in ("fp8", "sinks", "ALiBi"):
        assert named in str(refused.value)


@pytest.mark.parametrize(
    ("given", "native"),
    [
        (projection(32, 32, "post"), True),
        (projection(32, 32, "pre"), False),
        (projection(32, 24, "post"), False),
        (projection(20, 20, "post"), False),
    ],
)
def test_only_equal_post_ranks_the_backend_lists_ride_its_kernel(monkeypatch, given, native):
    """On a CPU ours serves, where numba is there."""
    for numba in (False, True):
        monkeypatch.setattr(machine_code, "is_there", lambda numba=numba: numba)
        for backend in attention.NATIVE_BACKENDS:
            ours = numba and backend == "CPU_ATTN"
            assert attention._rides_native(layer(backend), given) is (native and not ours)
        assert not attention._rides_native(layer("FLASHINFER"), given)


@pytest.mark.parametrize(
    ("dtype", "backend", "given", "stored"),
    [
        ("fp8", "CPU_ATTN", projection(32, 32, "post"), True),
        ("fp8_e4m3", "CPU_ATTN", projection(64, 64, "post"), True),
        ("fp8_e5m2", "CPU_ATTN", projection(32, 32, "post"), False),
        ("int8_per_token_head", "CPU_ATTN", projection(32, 32, "post"), False),
        ("fp8", "FLASH_ATTN", projection(32, 32, "post"), False),
        ("fp8", "CPU_ATTN", projection(48, 48, "post"), False),
        ("fp8", "CPU_ATTN", projection(32, 24, "post"), False),
        ("fp8", "CPU_ATTN", projection(32, 32, "pre"), False),
    ],
)
def test_which_caches_vllm_stores_in_fp8(monkeypatch, dtype, backend, given, stored):
    """There its kernel rides, whether numba is there or not."""
    odd = layer(backend, kv_cache_dtype=dtype, kv_cache_torch_dtype=torch.uint8)
    odd.attn_backend.supports_head_size = lambda size: size % 16 == 0
    monkeypatch.setattr(machine_code, "is_there", lambda: True)
    assert attention._stores(odd, given) is stored
    if stored:
        attention._refuse_unsupported(odd, given)
        assert attention._rides_native(odd, given)
    else:
        with pytest.raises(UnsupportedModelError, match=dtype):
            attention._refuse_unsupported(odd, given)


def test_an_unknown_depth_of_verification(monkeypatch, tmp_path):
    monkeypatch.setenv(quantization.VERIFY_VARIABLE, "quick")
    with pytest.raises(SvdError, match="accepted are contents, headers, none"):
        served(projection()).maybe_update_config(str(tmp_path))
