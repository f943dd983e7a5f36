"""What the tests of machine code share."""

import pytest
import torch


@pytest.fixture
def a_team():
    """Of two threads, whatever cores this process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
