"""Keys that are rebuilt with the tables of vLLM's own rotary embeddings."""

from dataclasses import replace

import pytest
import torch
from every_kernel import KERNELS, build, check
from paged_cases import DEVICE
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_svd.attention.rotary import QueryRotary
from vllm_svd.compat import RotaryEmbedding
from vllm_svd.kernels.latent_attention import reference
from vllm_svd.kernels.paged_batch import Rope

SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
PROMPT = 90
D = 32


def rotary_of(name: str) -> RotaryEmbedding:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(D, 256, True, SCALED[name], dtype=torch.float32).to(DEVICE)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SCALED)
def test_queries_and_rebuilt_keys_are_turned_alike(kernel, name):
    """The layer turns queries, the kernel keys: as far, and as much longer, as vLLM turns both."""
    rotary, case = rotary_of(name), build([(PROMPT, PROMPT), (1, 120)], d=D)
    positions = torch.tensor([*range(PROMPT), 119], device=DEVICE)
    flat = case.query.flatten(1)
    turned, left = QueryRotary(rotary)(positions, flat.clone(), flat)
    assert torch.equal(left, flat)
    rope = Rope(rotary.cos_sin_cache, rotary.is_neox_style)
    both = rotary.forward_native(positions, flat.clone(), flat.clone())
    heads = case.query.transpose(0, 1)
    expected = reference.rotate(heads, rope, positions).transpose(0, 1).flatten(1)
    for found in (turned, *both):
        torch.testing.assert_close(found, expected)
    settings = case.settings | {"rope": rope}
    check(kernel, replace(case, query=turned.view_as(case.query), settings=settings))


def test_the_table_of_yarn_makes_keys_longer():
    lengths = {name: rotary_of(name).cos_sin_cache.square().sum(-1) / (D / 2) for name in SCALED}
    torch.testing.assert_close(lengths["llama3"], torch.ones_like(lengths["llama3"]))
    factor = 0.1 * torch.tensor(4.0).log() + 1
    torch.testing.assert_close(lengths["yarn"], (factor**2).expand_as(lengths["yarn"]).to(DEVICE))
