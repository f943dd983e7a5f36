"""An output directory: complete by one rename, or absent."""

import errno

import pytest
from safetensors import SafetensorError

from offline_compress.staging import OutputError, ensure_room, leftovers, staged


def test_an_existing_output_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="already exists"), staged(out, 0):
        pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == [out]


def test_missing_parents_are_made_but_not_under_a_file(tmp_path):
    with staged(tmp_path / "a" / "b" / "out", 0) as directory:
        (directory / "x").touch()
    assert (tmp_path / "a" / "b" / "out" / "x").exists()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="is not a directory"), staged(file / "out", 0):
        pytest.fail("the block ran")


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError, match=rf"needs {1 << 60:,} bytes and [\d,]+ are free"):
        ensure_room(tmp_path / "out", 1 << 60)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: File too large (os error 27)"), True),
        (OSError(errno.EACCES, "Permission denied", "/some/where"), False),
        (SafetensorError("I/O error: Input/output error (os error 5)"), False),
    ],
)
def test_only_a_full_disk_is_called_full(tmp_path, error, full):
    with pytest.raises(OutputError) as caught, staged(tmp_path / "out", 1000):
        raise error
    assert str(error) in str(caught.value)
    assert ("it needs 1,000 bytes" in str(caught.value)) == full
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_those_of_this_output(tmp_path):
    for name in (".out.0a.partial", ".outer.0a.partial", "out.0a.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.0a.partial" / "shard").write_bytes(b"123")
    assert leftovers(tmp_path / "out") == {tmp_path / ".out.0a.partial": 3}
    assert leftovers(tmp_path / "absent" / "out") == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_ends_the_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "out", 0) as directory:
        (directory / "half").write_text("written")
        assert not (tmp_path / "out").exists()
        raise error
    assert list(tmp_path.iterdir()) == []
