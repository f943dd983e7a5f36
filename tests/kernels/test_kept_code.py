"""Machine code is compiled once: later processes load it, or compile where it is not to be used."""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from vllm_svd.kernels import latent_attention, latent_store, native
from vllm_svd.kernels.native import sources

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
    return made.loaded


def test_what_was_compiled_is_loaded(root, caplog):
    caplog.set_level("INFO", "vllm.svd")
    assert not loaded()
    assert "Compiling _answer for this CPU" in caplog.text
    caplog.clear()
    assert loaded()
    assert not caplog.text
    (file,) = (path for path in root.rglob("*") if path.is_file())
    for directory in (file.parent, file.parent.parent):
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["cut off", "empty", "flipped"])
def test_what_was_damaged_is_made_again(root, caplog, damage):
    loaded()
    (file,) = root.rglob("*.o")
    whole = file.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    file.write_bytes({"cut off": whole[:-100], "empty": b"", "flipped": flipped}[damage])
    assert not loaded()
    assert f"{file} is damaged" in caplog.text
    assert loaded()


def test_what_needs_a_symbol_that_is_not_there_is_made_again(root):
    """LLVM would abort the process."""
    loaded()
    (file,) = root.rglob("*.o")
    line, _, code = file.read_bytes().partition(b"\n")[2].partition(b"\n")
    contents = json.dumps(json.loads(line) | {"needs": ["no_such_symbol"]}).encode() + b"\n" + code
    file.write_bytes(hashlib.sha256(contents).hexdigest().encode() + b"\n" + contents)
    assert not loaded()
    assert loaded()


@pytest.mark.parametrize("which", ["directory", "parent"])
def test_what_others_may_write_to_is_not_loaded(caplog, which):
    caplog.set_level("INFO", "vllm.svd")
    assert not loaded() and loaded()
    directory = entries.kept_in()
    (directory if which == "directory" else directory.parent).chmod(0o770)
    assert not loaded()
    assert f"others may write to {directory}" in caplog.text


def test_where_nothing_can_be_kept_each_process_compiles(root):
    shutil.rmtree(root)
    root.touch()
    assert not loaded() and not loaded()
    assert root.is_file()


def test_a_full_disk_costs_no_more_than_the_file(root, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(entries.Path, "write_bytes", full)
    assert not loaded() and not loaded()
    assert "Machine code is not kept: [Errno 28]" in caplog.text
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_nothing_is_kept_where_vllm_keeps_nothing(root, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    assert not loaded() and not loaded()
    assert not [*root.rglob("*")]


def test_a_user_without_a_home_compiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "~nobody_of_this_name/cache")
    assert not loaded() and not loaded()
    assert not [*tmp_path.iterdir()]


def test_another_process_loads_the_kernels(monkeypatch):
    monkeypatch.undo()  # where all tests keep them
    if entries.kept_in() is None:
        pytest.skip("this user keeps nothing")
    for module in (latent_attention.compiled, latent_store.compiled):
        module.warm_up()
    program = """
from vllm_svd.kernels.latent_store.native_store import store
from vllm_svd.kernels.latent_attention.native_team import team
assert store.loaded and team.loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_machine_code_is_of_these_sources_settings_and_units(monkeypatch):
    seen = {entries.digest()}
    assert entries.digest() in seen
    monkeypatch.setattr(entries.matrix, "THERE", not entries.matrix.THERE)
    seen.add(entries.digest())
    monkeypatch.setenv("NUMBA_OPT", "1")
    seen.add(entries.digest())
    monkeypatch.setattr(sources, "DIGEST", "others")
    seen.add(entries.digest())
    assert len(seen) == 4


def test_sources_are_all_modules(tmp_path):
    package = tmp_path / "package"
    assert sources.digest(package) == ""
    (package / "inner").mkdir(parents=True)
    (package / "one.py").write_text("a = 1")
    seen = {sources.digest(package)}
    (package / "inner" / ".#two.py").symlink_to("nowhere")  # an editor's lock
    assert sources.digest(package) in seen
    for name, text in (("one.py", "a = 2"), ("inner/two.py", ""), ("inner/three.py", "")):
        (package / name).write_text(text)
        seen.add(sources.digest(package))
    (package / "inner" / "three.py").rename(package / "three.py")
    seen.add(sources.digest(package))
    assert len(seen) == 5
    assert (sources.PACKAGE / "kernels" / "native" / "entry.py").is_file()
    assert (sources.PACKAGE / "format").is_dir()
