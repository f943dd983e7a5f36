"""Windows of text, their hidden states, and the workers that share them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.calibration import HiddenStates, TextError, Workers, split

CPU = torch.device("cpu")


def windows_of(tokens=4096, **changes):
    wanted = {"samples": 6, "held_out": 2, "context": 32, "seed": 0, "bos": None} | changes
    return split(torch.arange(100, 100 + tokens), **wanted)


@given(
    samples=st.integers(1, 9),
    held_out=st.integers(1, 5),
    context=st.integers(2, 40),
    extra=st.integers(0, 200),
    seed=st.integers(0, 1000),
    bos=st.sampled_from([None, 7]),
)
def test_windows_are_text_and_share_no_token(samples, held_out, context, extra, seed, bos):
    total = (samples + held_out) * context + extra
    found = windows_of(
        total, samples=samples, held_out=held_out, context=context, seed=seed, bos=bos
    )
    assert found.calibration.shape == (samples, context)
    assert found.held_out_windows().shape == (held_out, context)
    bodies = []
    for windows in (found.calibration, found.held_out_windows()):
        body = windows
        if bos is not None:
            assert (windows[:, 0] == bos).all()
            body = windows[:, 1:]
        assert (body.diff(dim=1) == 1).all()
        bodies.append(body.flatten())
    assert torch.equal(bodies[1], found.held_out)
    assert found.held_out[-1] == 100 + total - 1  # up to the end of the text
    used = torch.cat(bodies)
    assert len(used.unique()) == len(used)


def test_the_seed_decides_the_offsets():
    first, again, other = (windows_of(seed=seed).calibration for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_text_one_token_too_short_is_refused_with_the_number_needed():
    windows_of(256)
    with pytest.raises(TextError, match=r"holds 255 tokens; 6 calibration .* need 256"):
        windows_of(255)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_hidden_states_live_in_a_file_above_their_limit(tmp_path, limit):
    values = torch.randn(5, 3, 8).bfloat16()
    states = HiddenStates((5, 3, 8), torch.bfloat16, tmp_path, "dense", limit)
    assert (len(states), states.bytes) == (5, values.nbytes)
    for rows in (slice(0, 3), slice(3, 5)):
        states.write(rows, values[rows].float().requires_grad_())
    read = states.read(slice(1, 4), CPU)
    assert torch.equal(read, values[1:4])
    read.zero_()  # a copy: the states stay
    assert torch.equal(states.read(slice(0, 5), CPU), values)
    files = list(tmp_path.iterdir())
    assert [file.stat().st_size for file in files] == ([values.nbytes] if limit == 0 else [])
    states.remove()
    assert not list(tmp_path.iterdir())


@given(samples=st.integers(0, 40), size=st.integers(1, 9))
def test_workers_share_every_sample_once_and_evenly(samples, size):
    shares = [range(samples)[Workers(rank, size).share(samples)] for rank in range(size)]
    assert [sample for share in shares for sample in share] == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
