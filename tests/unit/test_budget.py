"""Budgets of methods whose ranks take other bytes than two factors in the model's dtype."""

from fractions import Fraction

import pytest
import torch

from offline_compress.allocation import Evidence, Strs, TruncationLoss, WaterFilling
from offline_compress.allocation.budget import Budget
from offline_compress.methods import DobiSvd, Layer
from offline_compress.planning import matrices_of


@pytest.mark.parametrize("allocator", [TruncationLoss(), WaterFilling(), Strs()])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_budgets_count_the_bytes_of_remapped_ranks(allocator, item_bytes):
    """8-bit factors have twice the ranks: those of the shares are those of the artefacts."""
    method, kept = DobiSvd(), Fraction(1, 2)
    layer = Layer("l", {f"l.{i}": (64, 96 + 32 * i) for i in range(3)}, 1, 1, 1, item_bytes)
    matrices = matrices_of([layer], method)
    spectra = {
        path: 1e4 * (0.9 - 0.1 * index) ** torch.arange(64, dtype=torch.float64)
        for index, path in enumerate(matrices)
    }
    tried = []

    def loss(shares):
        tried.append(shares)
        made = method.modules_at(layer, shares)
        tails = (spectra[path][made[path].rank :].sum() for path in shares)
        return 3.0 + float(sum(tails))

    shares = allocator.shares(kept, Evidence(matrices, spectra, loss=loss))
    budget = Budget(kept, matrices)
    for asked in (shares, *tried):
        for path, share in asked.items():
            if share == 1:
                continue  # dense
            module = method.modules_at(layer, {path: share})[path]
            held, step = share * budget.sizes[path].dense, budget.sizes[path].step
            assert held % step == 0
            assert module.rank == min(64, held // step)
    made = method.modules_at(layer, shares)
    dense = sum(map(layer.dense_bytes, shares))
    held = (
        layer.dense_bytes(path) if isinstance(module, str) else module.bytes(item_bytes)
        for path, module in made.items()
    )
    assert sum(held) <= kept * dense
