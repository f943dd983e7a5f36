"""Packing of sparse factored deltas: every bit of it is known from the config."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load, save

from offline_compress.factors.delta import DeltaFactors, chosen
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.delta import Delta
from vllm_svd.format.dtypes import DTYPE_BYTES

DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.float32: "F32"}


def packed(rows, columns, rank, bits=16, masks="seeded", seed=0):
    """Random factors, and a delta that keeps a random number of entries of each column."""
    g = torch.Generator().manual_seed(seed)
    lengths = {"U": rows, "V": columns}
    factors = {
        name: torch.randn(rank, length, generator=g, dtype=torch.float64)
        for name, length in lengths.items()
    }
    counts = {
        name: torch.randint(0, length + 1, (rank,), generator=g) for name, length in lengths.items()
    }
    for count in counts.values():
        count[0].clamp_min_(1)
    module = Delta(
        out_features=rows,
        in_features=columns,
        rank=rank,
        kept_u=int(counts["U"].sum()),
        kept_v=int(counts["V"].sum()),
        bits=bits,
        masks=masks,
        seed=seed,
    )
    return factors, counts, module, DeltaFactors.pack(module, factors, counts)


@st.composite
def deltas(draw):
    rows, columns = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    return packed(
        rows,
        columns,
        draw(st.integers(1, min(rows, columns))),
        draw(st.sampled_from([4, 8, 16])),
        draw(st.sampled_from(["seeded", "bitmap"])),
        draw(st.integers(0, (1 << 32) - 1)),
    )


@given(deltas())
def test_what_is_unpacked_is_what_was_kept(made):
    """Exactly in 16 bits, within half a step of each column else."""
    factors, counts, module, found = made
    stored = Delta.model_validate_json(module.model_dump_json())
    file = save({name: part.contiguous() for name, part in found.parts().items()})
    again = DeltaFactors.of_parts(stored, load(file))
    product = torch.ones(module.rank, dtype=torch.float64)
    for name, rows in factors.items():
        mask = chosen(counts[name], rows.shape[1], module.seed, name)
        assert torch.equal(mask.sum(1), counts[name])
        kept = torch.where(mask, rows, 0.0)
        unpacked = again.factor(name)
        if module.bits == 16:
            assert torch.equal(unpacked, kept)
            continue
        largest = 2 ** (module.bits - 1) - 1
        step = kept.abs().amax(1) / largest
        product *= step
        assert (unpacked.abs() <= largest).all()
        assert ((unpacked * step[:, None] - kept).abs() <= step[:, None] * 0.5000001).all()
    if module.bits != 16:
        torch.testing.assert_close(again.packed["scale"], product.float())
    torch.testing.assert_close(again.delta(), found.delta(), rtol=0, atol=0)


@given(deltas())
def test_bytes_are_those_of_the_file(made):
    module, found = made[2], made[3].to(torch.bfloat16)
    tensors = found.tensors("layer")
    described = module.tensors("layer")
    assert tensors.keys() == described.keys()
    for name, tensor in tensors.items():
        shape, dtype = described[name]
        assert tuple(tensor.shape) == shape
        assert DTYPES.get(tensor.dtype) == dtype
        assert tensor.element_size() == (DTYPE_BYTES[dtype] if dtype else 2)
    file = save(tensors)
    header = 8 + int.from_bytes(file[:8], "little")
    assert module.bytes(2) == len(file) - header


def mix(x):
    """As the format states it, in Python's integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("name", ["U", "V"])
def test_masks_are_those_that_the_format_defines(seed, name):
    length, counts = 37, torch.tensor([37, 20, 1, 0, 5])
    mask = chosen(counts, length, seed, name)
    start = mix((seed + "UV".index(name)) % 2**32)
    for k, count in enumerate(counts.tolist()):
        keys = {mix(mix(start ^ k) ^ mix(i)): i for i in range(length)}
        assert len(keys) == length
        expected = sorted(keys[key] for key in sorted(keys)[:count])
        assert mask[k].nonzero().flatten().tolist() == expected


def test_every_entry_is_as_likely_as_any_other():
    """Frequencies over seeds, columns and factors: 5 sigma of a binomial, for all 64 entries."""
    draws, rank, length, count = 300, 10, 32, 8
    counts = torch.full((rank,), count)
    for name in "UV":
        hits = sum(chosen(counts, length, seed, name).sum(0) for seed in range(draws))
        p, trials = count / length, draws * rank
        sigma = (trials * p * (1 - p)) ** 0.5
        assert ((hits - trials * p).abs() < 5 * sigma).all()


def test_a_bitmap_and_a_seed_say_the_same():
    _, _, _, seeded = packed(11, 7, 5, bits=8, masks="seeded", seed=3)
    _, _, _, bitmap = packed(11, 7, 5, bits=8, masks="bitmap", seed=3)
    assert torch.equal(seeded.delta(), bitmap.delta())
    assert not {"U_count", "V_count"} & bitmap.parts().keys()


def test_the_base_is_attached_and_never_stored():
    _, _, module, found = packed(9, 6, 4)
    base = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(LookupError, match="base"):
        found.dense()
    on = found.on(base)
    torch.testing.assert_close(on.dense(), base + found.delta(), rtol=0, atol=0)
    assert on.to(torch.float32).base is base
    assert on.parts().keys() == module.parts().keys()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(on.apply(x), x @ (base + found.delta()).T)
    corrected = DeltaFactors(module, found.packed, base, correction=torch.ones(9)).to(torch.float32)
    assert corrected.config().correction
    torch.testing.assert_close(corrected.apply(x), x @ corrected.dense().T + 1)


def test_masks_that_disagree_with_the_config_are_refused():
    _, _, module, found = packed(9, 6, 4)
    parts = found.parts() | {"V_count": found.parts()["V_count"].flip(0) * 0}
    with pytest.raises(CheckpointFormatError, match="0 entries"):
        DeltaFactors.of_parts(module, parts).delta()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("rank", 7, "rank 7"), ("kept_u", 37, "37 entries"), ("kept_v", 25, "25 entries")],
)
def test_a_config_that_no_matrix_fits_is_refused(field, value, said):
    fields = {"out_features": 9, "in_features": 6, "rank": 4, "kept_u": 36, "kept_v": 24}
    Delta(**fields)
    with pytest.raises(ValidationError, match=said):
        Delta(**fields | {field: value})
