"""The work directory: records that are complete or absent, and what becomes of it."""

import pytest
import torch

from offline_compress.staging import OutputError
from offline_compress.workspace import Workspace, forsaken, work_root, workspace


def test_a_record_is_what_was_saved(tmp_path):
    work = Workspace(tmp_path)
    tensors = {
        "a.b|c": torch.randn(3, 4).T,  # not contiguous
        "half": torch.randn(5).bfloat16(),
        "packed": torch.randint(0, 9, (2, 2), dtype=torch.int32),
    }
    facts = {"loss": 0.1, "nested": [1, None, {"text": "x"}]}
    work.save("block-0", tensors, facts)
    work.save("empty", {}, "only facts")
    found, said = work.load("block-0")
    assert found.keys() == tensors.keys() and said == facts
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert work.load("empty") == ({}, "only facts")
    assert work.load("absent") is None
    work.save("block-0", {}, "another")
    assert work.load("block-0") == ({}, "another")


@pytest.mark.parametrize("content", [b"", b"\x10", b"\x02" + bytes(7) + b"{}", b"x" * 100])
def test_a_record_that_cannot_be_read_counts_as_absent(tmp_path, content):
    (tmp_path / "block-0.safetensors").write_bytes(content)
    assert Workspace(tmp_path).load("block-0") is None


def test_only_the_first_process_writes(tmp_path):
    with workspace(tmp_path / "out", "key") as first:
        with workspace(tmp_path / "out", "key", first=False) as other:
            other.save("block-0", {}, "mine")
            assert first.load("block-0") is None
            first.save("block-0", {}, "shared")
            assert other.load("block-0") == ({}, "shared")
        assert first.directory.is_dir()
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_recipe_do_not_write_one_output(tmp_path):
    with workspace(tmp_path / "out", "key") as work:
        with (
            pytest.raises(OutputError, match="another run is writing"),
            workspace(tmp_path / "out", "key"),
        ):
            pytest.fail("the block ran")
        assert work.directory.is_dir()
        with workspace(tmp_path / "out", "other") as second:
            assert second.directory != work.directory


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_stopped_keeps_its_records_for_the_next(tmp_path, error):
    with pytest.raises(error), workspace(tmp_path / "out", "key") as work:
        work.save("block-0", {}, "kept")
        raise error
    with workspace(tmp_path / "out", "key") as again:
        assert again.load("block-0") == ({}, "kept")
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_of_itself_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="x"), workspace(tmp_path / "out", "key") as work:
        work.save("block-0", {}, "lost")
        raise ValueError("x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "full"), OutputError("full")])
def test_a_run_that_cannot_write_keeps_its_records_alone(tmp_path, error):
    said = pytest.raises(OutputError, match=r"What was computed waits in .*\.out\.work")
    with said, workspace(tmp_path / "out", "key") as work:
        work.save("block-0", {}, "kept")
        (work.directory / "dense-0.hidden").write_bytes(b"large")
        raise error
    (left,) = work_root(tmp_path / "out").glob("*/*")
    assert left.name == "block-0.safetensors"
    with pytest.raises(OutputError), workspace(tmp_path / "other", "key"):
        raise error  # before there was a record
    assert not work_root(tmp_path / "other").exists()


def test_another_process_of_the_run_says_the_same_of_a_full_disk(tmp_path):
    with (
        pytest.raises(OutputError, match="cannot be written"),
        workspace(tmp_path / "out", "key", first=False),
    ):
        raise OSError(28, "full")


def test_a_place_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="cannot be written"),
        workspace(tmp_path / "file" / "out", "key"),
    ):
        pytest.fail("the block ran")


def test_what_killed_runs_left_is_known_by_its_size(tmp_path):
    out = tmp_path / "out"
    assert forsaken(out) == {}
    left = work_root(out) / "old"
    left.mkdir(parents=True)
    (left / "block-0.safetensors").write_bytes(b"123")
    assert forsaken(out) == {left: 3}
    with workspace(out, "key"):
        pass
    assert forsaken(out) == {left: 3}  # another's work stays
