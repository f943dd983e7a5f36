"""What layers of one step share, and steps do not."""

from copy import copy
from types import SimpleNamespace

import pytest
import torch

from vllm_svd.attention.metadata import LatentMetadataBuilder
from vllm_svd.compat import CommonAttentionMetadata


def common(**changed):
    starts = torch.tensor([0, 101, 152], dtype=torch.int32)
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor([101, 51], dtype=torch.int32),
        "num_reqs": 2,
        "num_actual_tokens": 152,
        "max_query_len": 101,
        "max_seq_len": 101,
        "block_table_tensor": torch.zeros(2, 8, dtype=torch.int32),
        "slot_mapping": torch.arange(152),
    }
    return CommonAttentionMetadata(**fields | changed)


def builder():
    config = SimpleNamespace(model_config=None)
    return LatentMetadataBuilder(None, ["layer"], config, torch.device("cpu"))


def test_builders_of_several_shapes_of_pages_share_what_they_build_of_one_step():
    given = common()
    built = builder().build(0, given)
    assert builder().build(0, given) is built
    assert builder().build(0, common()) is not built


@pytest.mark.parametrize(
    "changed",
    [
        {"query_start_loc": torch.tensor([0, 101, 152], dtype=torch.int32)},
        {"seq_lens": torch.tensor([101, 51], dtype=torch.int32)},
        {"num_actual_tokens": 2},
        {"max_query_len": 1},
        {"slot_mapping": torch.arange(152)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_changed_in_place_is_built_anew(changed):
    given = common()
    built = builder().build(0, given)
    vars(given).update(changed)
    assert builder().build(0, given) is not built


def test_groups_with_tables_of_their_own_share_nothing():
    given = common()
    built = builder().build(0, given)
    other = copy(given)
    other.block_table_tensor = torch.ones(2, 8, dtype=torch.int32)
    assert builder().build(0, other).block_table is other.block_table_tensor
    assert builder().build(0, given) is built


def test_steps_of_a_drafter_which_change_one_object_in_place_share_nothing():
    """As vLLM's proposer does: the first pass of its draft model sees prompts, the next a token."""
    given = common()
    first = builder().build(0, given)
    drafts = [builder().build(0, given, fast_build=True)]
    given.query_start_loc = torch.tensor([0, 1, 2], dtype=torch.int32)
    given.num_actual_tokens, given.max_query_len = 2, 1
    for _ in range(2):
        given.seq_lens += 1
        drafts.append(builder().build(0, given, fast_build=True))
    assert len({id(metadata) for metadata in (first, *drafts)}) == 4
    assert [metadata.num_tokens for metadata in drafts] == [152, 2, 2]
    assert builder().build(0, given).num_tokens == 2
