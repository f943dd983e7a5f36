"""Machine code is compiled once: later processes load it, or compile where it is not to be used."""

import ctypes
import shutil

import pytest

from vllm_svd.kernels import native

if native.is_there():
    from vllm_svd.kernels.native import entry as entries
    from vllm_svd.kernels.native.memory import address, ints

pytestmark = pytest.mark.skipif(not native.is_there(), reason="needs numba")


def _answer(arguments):
    ints(address(arguments))[0] = 42


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.delenv("VLLM_DISABLE_COMPILE_CACHE", raising=False)
    return tmp_path


def loaded() -> bool:
    """Whether the function was loaded, of which an answer is asked either way."""
    made, answer = entries.entry(_answer), ctypes.c_int64()
    native.c_function(made)(ctypes.addressof(answer))
    assert answer.value == 42
    return made.cache_hits == 1


def test_what_was_compiled_is_loaded(root, caplog):
    caplog.set_level("INFO", "vllm.svd")
    assert not loaded()
    assert f"Compiling _answer for this CPU, once; kept in {root}" in caplog.text
    caplog.clear()
    assert loaded()
    assert not caplog.text
    (directory,) = (root / "vllm_svd").iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700


def test_what_was_cut_off_is_compiled(root, caplog):
    loaded()
    for path in root.rglob("*.nbc"):
        path.write_bytes(path.read_bytes()[:-100])
    assert not loaded()
    assert f"Cannot use machine code kept in {root}" in caplog.text


def test_what_others_may_write_to_is_not_loaded():
    loaded()
    entries.kept_in().chmod(0o777)
    assert entries.kept_in() is None
    assert not loaded()


def test_where_nothing_can_be_kept_each_process_compiles(root):
    shutil.rmtree(root)
    root.touch()
    assert not loaded() and not loaded()
    assert root.is_file()


def test_nothing_is_kept_where_vllm_keeps_nothing(root, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    assert not loaded() and not loaded()
    assert not [*root.rglob("*")]


def test_a_change_of_any_source_setting_or_cpu_is_another_directory(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "one.py").write_text("a = 1")
    seen = {entries.digest(package)}
    assert entries.digest(package) in seen
    for name, text in (("one.py", "a = 2"), ("inner/two.py", ""), ("inner/three.py", "")):
        (package / name).write_text(text)
        seen.add(entries.digest(package))
    (package / "inner" / "three.py").rename(package / "three.py")
    seen.add(entries.digest(package))
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    seen.add(entries.digest(package))
    assert len(seen) == 6


def test_the_sources_are_those_of_the_package():
    assert (entries.PACKAGE / "kernels" / "native" / "entry.py").is_file()
    assert (entries.PACKAGE / "format").is_dir()
