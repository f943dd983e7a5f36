"""Moments of inputs that a router may send elsewhere in the compressed model, or that overflow."""

import pytest
import torch

from offline_compress.calibration import ActivationError, Workers
from offline_compress.calibration.moments import InputMoments
from offline_compress.methods import Auto

SHIFTED = frozenset({"mean", "shifted_mean", "shifted_gram", "shift"})


def moments(x, there, paired):
    found = InputMoments(x.shape[1], x.device, SHIFTED, paired=paired)
    found.add(x, there)
    return found.statistics("layer", Workers())


def test_inputs_of_other_tokens_give_no_shift_of_mean_or_gram():
    x, there = torch.randn(40, 5) + 1, torch.randn(30, 5) - 1
    seen = moments(x, there, paired=False)
    assert not seen.shift.any()
    assert torch.equal(seen.mean, seen.shifted_mean)
    weight = torch.randn(7, 5, dtype=torch.float64)
    _, target = Auto()._shifted(weight, seen)
    torch.testing.assert_close(target, weight)


def test_pairs_keep_both_means():
    x = torch.randn(40, 5).double()
    there = x + 2
    seen = moments(x, there, paired=True)
    torch.testing.assert_close(seen.mean + 2, seen.shifted_mean)
    torch.testing.assert_close(seen.shift, (x - there).T @ there / 40)


def test_an_input_that_is_not_finite_in_the_compressed_model_alone_is_refused():
    x = torch.ones(4, 3)
    there = x.clone()
    there[1, 2] = torch.inf
    with pytest.raises(ActivationError, match="the input of layer"):
        moments(x, there, paired=True)
