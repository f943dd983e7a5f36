"""The dense model: which files count, and what is refused before anything is computed."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_compress.weights import SourceError, open_source

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tied(tiny_checkpoint, tmp_path):
    """A copy of a model with tied embeddings, in one file."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tied):
    """The same model in two shards with their index."""
    held = list(load_file(tied / "model.safetensors").items())
    (tied / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((held[:9], held[9:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(part), tied / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(dict(part), file)
    (tied / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tied


def save_with(directory, **tensors):
    held = load_file(directory / "model.safetensors")
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(held | changed, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tied):
    embedding = open_source(str(tied)).read("model.embed_tokens.weight")
    save_with(tied, lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in open_source(str(tied)).shapes
    other = embedding.clone()
    other[0, 0] += 1
    save_with(tied, lm_head__weight=other)
    with pytest.raises(SourceError, match=r"tie_word_embeddings to false in config\.json"):
        open_source(str(tied))
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tied / "config.json").write_text(json.dumps(config))
    assert torch.equal(open_source(str(tied)).read("lm_head.weight"), other)


def test_only_indexed_files_are_read(sharded):
    expected = open_source(str(sharded)).read("model.norm.weight")
    save_file({"model.norm.weight": expected + 1}, sharded / "z-stale.safetensors")
    save_file({"tok_embeddings.weight": expected}, sharded / "consolidated.safetensors")
    assert torch.equal(open_source(str(sharded)).read("model.norm.weight"), expected)


def test_one_file_goes_before_an_index(tied):
    (tied / INDEX).write_text("{")  # a leftover, which transformers does not read either
    assert set(open_source(str(tied)).stored.paths.values()) == {tied / "model.safetensors"}


def test_a_tensor_in_two_shards_and_a_missing_shard_are_reported(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    held = load_file(second)
    twice = next(iter(load_file(first)))
    save_file(held | {twice: torch.ones(2)}, second)
    with pytest.raises(SourceError, match=f"{twice} is in {first.name} and in {second.name}"):
        open_source(str(sharded))
    second.unlink()
    with pytest.raises(SourceError, match=f"{second.name} is missing"):
        open_source(str(sharded))


def test_a_tensor_that_is_not_where_the_index_has_it_is_reported(sharded):
    second = max(sharded.glob("*.safetensors"))
    held = load_file(second)
    name = next(iter(held))
    del held[name]
    save_file(held, second)
    with pytest.raises(SourceError, match=f"{name} is not in {second.name}"):
        open_source(str(sharded))


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'),
        '{"weight_map": {"a": "../model.safetensors"}}',
    ],
)
def test_a_malformed_index_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(SourceError, match="is not an index of safetensors files"):
        open_source(str(sharded))


def test_shards_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(SourceError, match=r"but neither model.safetensors nor .*index.json"):
        open_source(str(sharded))


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that a snapshot needs; `gated/*` is refused to all."""

    def do_GET(self):
        files, sha = self.server.files, "0" * 40
        path = self.path.partition("?")[0]
        name = path.rpartition(f"/resolve/{sha}/")[2]
        if path.startswith("/api/models/") and "/tree/" not in path:
            self._send(200, json.dumps({"id": "org/model", "sha": sha}).encode())
        elif path.startswith("/api/models/"):
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": "1" * 40}
                for file, content in files.items()
            ]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith("/gated/"):
            self._send(403, b"", **{"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif name in files:
            self.server.fetched.add(name)
            etag = hashlib.sha1(name.encode()).hexdigest()
            self._send(200, files[name], **{"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        else:
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass

    def _send(self, status, body, **headers):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(body)} | headers
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    """Serve a directory as a repository: open(model, directory) gives (its output, its files)."""

    def open_at_hub(model, directory):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        server.fetched = set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            "import sys; from offline_compress.weights import SourceError, open_source\n"
            "try: print(sorted({p.name for p in open_source(sys.argv[1]).stored.paths.values()}))\n"
            "except SourceError as error: print(error)"
        )
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "NO_PROXY": "*",
        }
        command = [sys.executable, "-c", script, model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        server.shutdown()
        server.server_close()
        assert done.returncode == 0, done.stderr
        return done.stdout, server.fetched

    return open_at_hub


def test_only_the_weights_that_are_read_are_fetched(hub, sharded):
    shards = {path.name for path in sharded.glob("*.safetensors")}
    (sharded / "consolidated.safetensors").write_bytes(b"a copy in another format")
    (sharded / "pytorch_model.bin").write_bytes(b"another")
    output, fetched = hub("org/model", sharded)
    assert output.strip() == str(sorted(shards))
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == shards


def test_a_gated_model_names_its_licence_and_the_login(hub, tied):
    output, _ = hub("gated/model", tied)
    assert "the hub refuses access to it" in output
    assert "accept its licence on https://huggingface.co/gated/model" in output
    assert "hf auth login" in output
    assert "HF_TOKEN" in output


def test_the_dtype_of_the_config_wins_over_the_stored_one(tiny_checkpoint, tmp_path):
    """bf16 in config.json and F32 on disk: the checkpoint is written in bf16."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert open_source(str(directory)).dtype == "BF16"
    assert open_source(str(tiny_checkpoint("llama"))).dtype == "F32"
