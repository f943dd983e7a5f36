"""Machine code is compiled once: later processes load it, or compile where it is not to be used."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_svd.kernels import native
from vllm_svd.kernels.native import elf, sources

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
    assert file.name == "test_kept_code._answer.o"


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


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_what_others_may_write_to_is_not_loaded(root, caplog, mode):
    assert not loaded() and loaded()
    (file,) = root.rglob("*.o")
    file.chmod(mode)
    assert not loaded()
    assert f"{file} is not loaded: others own it or may write to it" in caplog.text
    assert loaded()  # made again


@pytest.mark.parametrize("owner", ["root", "another"])
def test_of_what_others_own_only_that_of_root_is_loaded(monkeypatch, owner):
    assert not loaded() and loaded()
    true = os.fstat

    def fstat(descriptor):
        parts = list(true(descriptor))
        parts[4] = 0 if owner == "root" else 54321
        return os.stat_result(parts)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert loaded() == (owner == "root")


def test_nothing_is_kept_of_sources_that_changed_meanwhile(root, monkeypatch, caplog):
    monkeypatch.setattr(sources, "digest", lambda _: "of what is there now")
    assert not loaded() and not loaded()
    assert "would not fit another process" in caplog.text
    assert not [*root.rglob("*.o")]


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


def test_another_process_loads_the_kernels(tmp_path_factory):
    """And they compute there what they should."""
    program = """
import sys
import torch
from compiled_cases import INT8_4_2, build, check
from vllm_svd.kernels.latent_store import compiled
from vllm_svd.kernels.latent_store.native_store import store
from vllm_svd.kernels.latent_attention.native_team import team
assert (store.loaded, team.loaded) == (sys.argv[1] == "loads",) * 2
for mode in ("pre", "post"):
    check(build([(1, 90), (7, 40)], mode=mode, tiers=INT8_4_2), build([(1, 90)], mode=mode))
"""
    root = tmp_path_factory.mktemp("kept")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    environment |= {"VLLM_CACHE_ROOT": str(root)}
    for does in ("compiles", "loads"):
        command = [sys.executable, "-c", program, does]
        subprocess.run(command, check=True, env=environment, timeout=600)


def test_symbols_that_code_leaves_to_others_are_found(root):
    loaded()
    (file,) = root.rglob("*.o")
    line, _, code = file.read_bytes().partition(b"\n")[2].partition(b"\n")
    needs = json.loads(line)["needs"]
    assert "PyErr_WriteUnraisable" in needs
    assert needs == elf.undefined_symbols(code)
    with pytest.raises(ValueError, match="no ELF64 object"):
        elf.undefined_symbols(b"MZ" + code[2:])


def test_machine_code_is_of_these_sources_settings_and_units(monkeypatch):
    monkeypatch.delenv("NUMBA_OPT", raising=False)
    seen = {entries.digest()}
    assert entries.digest() in seen
    codegen = SimpleNamespace(magic_tuple=lambda: ("triple", "another CPU", "+features"))
    changes = [
        (entries.matrix, "THERE", not entries.matrix.THERE),
        (entries.numba, "__version__", "0"),
        (entries.cpu_target.target_context, "codegen", lambda: codegen),
        (sources, "DIGEST", "others"),
    ]
    for place, name, value in changes:
        monkeypatch.setattr(place, name, value)
        seen.add(entries.digest())
    monkeypatch.setenv("NUMBA_OPT", "1")
    seen.add(entries.digest())
    assert len(seen) == 6


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
