"""What is installed in a dense model: projections of its caches and every artefact of a matrix."""

import torch

from offline_compress.factors import (
    CodebookFactors,
    DeltaFactors,
    LowRankFactors,
    LowRankInt8Factors,
    ReducedFactors,
)
from offline_compress.factors.codebook import packed
from offline_compress.families import family_of, head_dim
from offline_compress.kv import project
from offline_compress.reference import install_kv as install_on_layer
from vllm_svd.format import Delta, KVProjection

CONTEXT = 48
LAYER, ATTENTION = "model.layers.1", "model.layers.1.self_attn"


def tokens_for(model, samples=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (samples, CONTEXT), generator=generator)


def install_kv(model, path, bases):
    """On the attention layer at `path` of a whole model."""
    family = family_of(model.config)
    layer = model.get_submodule(path.removesuffix(f".{family.attention}"))
    install_on_layer(layer, family, path, bases)


def bases_for(model, statistics, mode, k_rank, v_rank, path=ATTENTION):
    config = KVProjection(
        mode=mode,
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=head_dim(model.config),
        k_rank=k_rank,
        v_rank=v_rank,
    )
    return project(statistics[mode][path], config)


@torch.no_grad()
def logits(model):
    return model(tokens_for(model)).logits


def assert_same_logits(found, expected):
    """Within fp32: ~100 additions of up to 1e-7 each in relative terms, over a few layers."""
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def corrected(weight):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(weight), generator=generator)


def low_rank(weight):
    basis = torch.linalg.svd(weight.double()).U[:, :5]
    return LowRankFactors(A=basis.T @ weight.double(), B=basis, correction=corrected(weight))


def low_rank_int8(weight):
    basis = torch.linalg.svd(weight.double()).U[:, :5]
    return LowRankInt8Factors.quantize(basis.T @ weight.double(), basis, a_tail=3, b_tail=2)


def codebook(weight):
    """Of random centroids and choices, in 2 x 2 groups; the last ones are narrower."""
    generator, (rows, columns) = torch.Generator().manual_seed(3), weight.shape
    group_rows, group_columns = rows // 2 + 1, columns // 2 // 4 * 4 + 4
    chosen = torch.randint(0, 8, (rows, columns // 4), generator=generator)
    centroids = torch.randint(-9, 9, (2, 2, 8, 4), generator=generator, dtype=torch.int8)
    scales = torch.rand(2, 2, generator=generator) / 100
    indices = packed(chosen, 3)
    return CodebookFactors(
        indices, centroids, scales, columns, group_rows, group_columns, correction=corrected(weight)
    )


def reduced(weight):
    rows, columns = torch.arange(0, len(weight), 2), torch.arange(1, weight.shape[1], 3)
    kept = weight[rows][:, columns]
    return ReducedFactors.of(kept, tuple(weight.shape), rows=rows, columns=columns)


def delta(weight):
    """On the weight itself, from which the checkpoint then differs."""
    generator, (rows, columns) = torch.Generator().manual_seed(4), weight.shape
    factors = {
        name: torch.randn(3, length, generator=generator) / 30
        for name, length in (("U", rows), ("V", columns))
    }
    counts = {name: torch.tensor([9, 0, 5]) for name in factors}
    config = Delta(out_features=rows, in_features=columns, rank=3, kept_u=14, kept_v=14, bits=8)
    return DeltaFactors.pack(config, factors, counts).on(weight)


MADE = {
    "low_rank": low_rank,
    "low_rank_int8": low_rank_int8,
    "codebook": codebook,
    "reduced": reduced,
    "delta": delta,
}
