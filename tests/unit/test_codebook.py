"""Packed indices, and vector-quantised weights as a checkpoint stores them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from offline_compress.factors.codebook import CodebookFactors, packed, unpacked
from vllm_svd.format import Codebook


def integers(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def made(module, seed=0):
    """A random artefact, and its indices before packing."""
    centroids = 1 << module.index_bits
    indices = integers(module.out_features, module.vectors, below=centroids, seed=seed)
    codebooks = integers(*module.groups, centroids, module.dim, below=255, seed=seed + 1) - 127
    scales = 0.5 + torch.rand(module.groups, generator=torch.Generator().manual_seed(seed))
    factors = CodebookFactors(
        packed(indices, module.index_bits),
        codebooks.to(torch.int8),
        scales,
        module.in_features,
        module.group_rows,
        module.group_columns,
    )
    return factors, indices


@st.composite
def modules(draw):
    dim = draw(st.sampled_from([1, 2, 3, 4]))
    return Codebook(
        out_features=draw(st.integers(1, 9)),
        in_features=draw(st.integers(1, 41)),
        dim=dim,
        index_bits=draw(st.integers(1, 5)),
        group_rows=draw(st.integers(1, 10)),
        group_columns=dim * draw(st.integers(1, 12)),
        correction=draw(st.booleans()),
    )


@given(
    bits=st.integers(1, 12),
    rows=st.integers(1, 4),
    count=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_indices_are_a_little_endian_bit_stream_and_come_back(bits, rows, count, seed):
    values = integers(rows, count, below=1 << bits, seed=seed)
    values[0] = (1 << bits) - 1
    words = packed(values, bits)
    assert torch.equal(unpacked(words, count, bits), values)
    assert words.dtype == torch.int32
    for row, stream in zip(values.tolist(), words, strict=True):
        number = sum(value << (place * bits) for place, value in enumerate(row))
        size = 4 * -(-count * bits // 32)
        assert stream.numpy().astype("<i4").tobytes() == number.to_bytes(size, "little")


@given(module=modules())
def test_dense_looks_every_vector_up_in_the_codebook_of_its_group(module):
    factors, indices = made(module)
    dense = factors.dense()
    assert dense.dtype == torch.float64
    for row in range(module.out_features):
        for column in range(module.in_features):
            group = row // module.group_rows, column // module.group_columns
            vector, place = divmod(column, module.dim)
            step = factors.codebooks[(*group, indices[row, vector], place)]
            assert dense[row, column] == step.double() * factors.scales[group].double()


@given(module=modules())
def test_the_file_holds_the_bytes_that_the_config_says(module, tmp_path_factory):
    factors, _ = made(module)
    if module.correction:
        factors = factors.rebuilt(factors.parts(), torch.ones(module.out_features))
    stored = factors.to(torch.bfloat16)
    assert stored.config() == module
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(stored.tensors("up_proj"), path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == module.bytes(item_bytes=2)
    loaded = load_file(path)
    described = module.tensors("up_proj")
    assert {name: tuple(part.shape) for name, part in loaded.items()} == {
        name: part.shape for name, part in described.items()
    }
    parts = {name.removeprefix("up_proj."): part for name, part in loaded.items()}
    assert torch.equal(CodebookFactors.of_parts(module, parts).dense(), factors.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_dense_matrix(dtype):
    module = Codebook(
        out_features=7, in_features=13, dim=2, index_bits=3, group_rows=3, group_columns=8
    )
    factors, _ = made(module)
    factors = factors.rebuilt(factors.parts(), torch.arange(7.0))
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x @ factors.dense().to(dtype).T + torch.arange(7.0).to(dtype)
    assert torch.equal(factors.apply(x), expected)
