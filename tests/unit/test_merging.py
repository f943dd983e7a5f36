"""Task arithmetic and TIES: what they give back, and what they must not depend on."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.merging import difference, merge, task_arithmetic, ties
from vllm_svd.errors import SvdError


def random(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("combine", [task_arithmetic, partial(ties, keep=1.0)])
def test_one_task_is_that_model_bit_for_bit(dtype, combine):
    base = {"a": random(7, 5).to(dtype), "b": random(9, seed=1).to(dtype)}
    tuned = {name: (w + 0.1 * random(*w.shape, seed=2)).to(dtype) for name, w in base.items()}
    reader = difference(base.__getitem__, tuned.__getitem__)
    merged = dict(merge(base, base.__getitem__, [reader], combine))
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, tuned[name])


def test_task_arithmetic_is_linear():
    first, second = random(6, 4), random(6, 4, seed=1)
    joined = task_arithmetic([first, second], 0.3)
    torch.testing.assert_close(joined, 0.3 * first + 0.3 * second)
    torch.testing.assert_close(task_arithmetic([first, -first]), torch.zeros_like(first))


def test_the_sign_with_the_larger_mass_is_elected():
    """Not the one with more votes: -5 outweighs 1 + 2, and 3 + 4 outweighs -5."""
    deltas = [torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0, 4.0, -2.0])]
    deltas.append(torch.tensor([-5.0, -5.0, 0.0]))
    expected = torch.tensor([-5.0, 3.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(ties(deltas, keep=1.0), expected)
    torch.testing.assert_close(ties(deltas, keep=1.0, scale=0.5), expected / 2)


def test_what_is_trimmed_neither_votes_nor_counts():
    deltas = [torch.tensor([4.0, -1.0, 0.1, 3.0]), torch.tensor([1.0, 5.0, 6.0, -0.2])]
    # Half stays: [4, 0, 0, 3] and [0, 5, 6, 0].
    expected = torch.tensor([4.0, 5.0, 6.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(ties(deltas, keep=0.5), expected)


@given(
    tasks=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    keep=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_ties_is_a_mean_of_entries_of_one_sign(tasks, shape, keep, seed):
    """Rounded values tie often; zeros are never elected."""
    deltas = [random(*shape, seed=seed + i).mul(2).round() for i in range(tasks)]
    merged = ties(deltas, keep)
    stacked = torch.stack(deltas)
    assert (merged <= stacked.clamp_min(0).amax(0)).all()
    assert (merged >= stacked.clamp_max(0).amin(0)).all()
    torch.testing.assert_close(merged, ties(deltas[::-1], keep))
    torch.testing.assert_close(ties([-delta for delta in deltas], keep), -merged)
    torch.testing.assert_close(ties([2 * delta for delta in deltas], keep), 2 * merged)
    if tasks == 1:
        kept = max(1, round(keep * deltas[0].numel()))
        largest = deltas[0].abs().flatten().sort(descending=True).values
        assert torch.equal(merged, torch.where(deltas[0].abs() >= largest[kept - 1], deltas[0], 0))


def test_zero_deltas_merge_to_the_base():
    base = {"a": random(3, 3).bfloat16()}
    zero = difference(base.__getitem__, base.__getitem__)
    for combine in (task_arithmetic, ties):
        merged = dict(merge(base, base.__getitem__, [zero, zero], combine))
        assert torch.equal(merged["a"], base["a"])


def test_tensors_are_read_one_at_a_time():
    read = []

    def reader(name):
        read.append(name)
        return torch.ones(2)

    stream = merge(["a", "b"], reader, [reader], task_arithmetic)
    assert next(stream)[0] == "a"
    assert read == ["a", "a"]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(keep):
    with pytest.raises(SvdError, match="above 0 and at most 1"):
        ties([torch.ones(2)], keep)


def test_models_that_do_not_belong_together_are_refused():
    base, tuned = {"a": torch.ones(2, 3)}, {"a": torch.ones(4, 3)}
    with pytest.raises(SvdError, match=r"a is \[4, 3\] in a fine-tuned model and \[2, 3\]"):
        difference(base.__getitem__, tuned.__getitem__)("a")
    for combine in (task_arithmetic, ties):
        with pytest.raises(SvdError, match=r"\[\[2\], \[3\]\]"):
            combine([torch.ones(2), torch.ones(3)])
        with pytest.raises(SvdError, match="none at all"):
            combine([])
