"""The format contract: what is accepted, and that every problem of a bad checkpoint is listed."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format import (
    Codebook,
    KVProjection,
    LowRank,
    LowRankInt8,
    Manifest,
    Reduced,
    ShardRecord,
    Stored,
    SvdCheckpointConfig,
    TensorRecord,
    parse,
    sha256,
    verify,
)
from vllm_svd.format.manifest import read_header

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SHAPE = {"out_features": 8, "in_features": 6}
# One of each artefact, with everything that it may store.
CONFIG = SvdCheckpointConfig(
    method="svd",
    modules={
        f"{ATTENTION}.q_proj": LowRank(**SHAPE, rank=3),
        f"{ATTENTION}.k_proj": LowRankInt8(**SHAPE, rank=4, a_tail=1, b_tail=2, correction=True),
        f"{MLP}.gate_proj": Codebook(**SHAPE, dim=4, index_bits=5, group_rows=3, group_columns=4),
        f"{MLP}.up_proj": Reduced(**SHAPE, kept_out=5, kept_in=2, correction=True),
    },
    kv={ATTENTION: KVProjection(mode="pre", num_kv_heads=2, head_dim=4, k_rank=2, v_rank=3)},
)
DTYPES = {"F32": torch.float32, "I8": torch.int8, "I32": torch.int32}


def stored(described: Stored, own: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor as `described`, of a model in the dtype `own`."""
    return torch.ones(described.shape, dtype=DTYPES[described.dtype] if described.dtype else own)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small valid directory of two shards."""
    described = CONFIG.tensors() | {"model.embed_tokens.weight": Stored((5, 6))}
    names = sorted(described)
    records = {}
    for shard, part in zip(SHARDS, (names[:3], names[3:]), strict=True):
        save_file({name: stored(described[name]) for name in part}, tmp_path / shard)
        for name in part:
            shape, dtype = described[name]
            records[name] = TensorRecord(dtype=dtype or "F32", shape=shape, shard=shard)
    seal(tmp_path, records)
    raw = {"architectures": ["LlamaForCausalLM"], "quantization_config": CONFIG.model_dump()}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def seal(directory: Path, records: dict[str, TensorRecord]) -> None:
    """Write the index and a manifest that agrees with the shards as they are."""
    shards = {
        shard: ShardRecord(
            bytes=(directory / shard).stat().st_size, sha256=sha256(directory / shard)
        )
        for shard in SHARDS
    }
    manifest = Manifest(tensors=records, shards=shards)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    index = {"weight_map": {name: record.shard for name, record in records.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit(path: Path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def refusal(directory: Path, **options: bool) -> str:
    with pytest.raises(CheckpointFormatError) as refused:
        verify(directory, **options)
    return str(refused.value)


def replace(directory: Path, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Store a tensor, another one or in place of its own, in a checkpoint that is sealed again."""
    manifest = Manifest.model_validate_json((directory / "manifest.json").read_text())
    shard = manifest.tensors[name].shard if name in manifest.tensors else SHARDS[1]
    save_file(load_file(directory / shard) | {name: tensor}, directory / shard)
    record = TensorRecord(dtype=dtype, shape=tuple(tensor.shape), shard=shard)
    seal(directory, manifest.tensors | {name: record})


def test_a_valid_checkpoint_gives_its_config(checkpoint):
    assert verify(checkpoint) == CONFIG


def test_config_survives_json():
    assert parse(json.loads(CONFIG.model_dump_json()), "here") == CONFIG


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", CONFIG.modules)
def test_an_artefact_knows_its_bytes(path, own):
    module = CONFIG.modules[path]
    assert all(name.startswith(f"{path}.") for name in module.tensors(path))
    tensors = [stored(described, own) for described in module.tensors(path).values()]
    assert module.bytes(own.itemsize) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("path", CONFIG.modules)
def test_an_artefact_that_the_config_forgot_is_found_by_every_part(checkpoint, path):
    edit(checkpoint / "config.json", lambda raw: raw["quantization_config"]["modules"].pop(path))
    message = refusal(checkpoint)
    for name in CONFIG.modules[path].tensors(path):
        assert f"{name}: not named by config.json" in message


@pytest.mark.parametrize(
    ("suffix", "dtype", "expected"),
    [
        ("q_proj.A", torch.int8, "dtype I8, config.json says BF16, F16, F32"),
        ("k_proj.A_int8", torch.float32, "dtype F32, config.json says I8"),
        ("k_proj.A_scale", torch.bfloat16, "dtype BF16, config.json says F32"),
        ("k_proj.A_tail", torch.int32, "dtype I32, config.json says BF16, F16, F32"),
    ],
)
def test_a_part_in_another_dtype_is_refused(checkpoint, suffix, dtype, expected):
    name = f"{ATTENTION}.{suffix}"
    tensor = stored(CONFIG.tensors()[name]).to(dtype)
    replace(checkpoint, name, tensor, expected.split()[1].rstrip(","))
    assert f"{name}: {expected}" in refusal(checkpoint)


def test_a_dense_tensor_in_a_packed_dtype_is_refused(checkpoint):
    replace(checkpoint, "model.embed_tokens.weight", torch.ones(5, 6, dtype=torch.int8), "I8")
    assert "dtypes ['I8'] are not accepted; accepted are BF16, F16, F32" in refusal(checkpoint)


def test_all_problems_are_listed_at_once(checkpoint):
    first, second = (checkpoint / shard for shard in SHARDS)
    first.write_bytes(first.read_bytes()[:-4])
    flipped = bytearray(second.read_bytes())
    flipped[-1] ^= 1
    second.write_bytes(flipped)
    save_file({"extra": torch.zeros(1)}, checkpoint / "model-00003-of-00003.safetensors")

    def rename(raw):
        kv = raw["quantization_config"]["kv"]
        kv["model.layers.1.self_attn"] = kv[ATTENTION]

    edit(checkpoint / "config.json", rename)
    message = refusal(checkpoint)
    assert "header promises" in message
    assert f"{SHARDS[1]}: its contents changed" in message
    assert "model-00003-of-00003.safetensors: the manifest names no such shard" in message
    assert message.count("model.layers.1.self_attn.attn.") == 4
    assert message.count("Remedy:") == 1


def test_headers_only_does_not_read_contents(checkpoint):
    flipped = bytearray((checkpoint / SHARDS[0]).read_bytes())
    flipped[-1] ^= 1
    (checkpoint / SHARDS[0]).write_bytes(flipped)
    assert verify(checkpoint, contents=False) == CONFIG
    assert "contents changed" in refusal(checkpoint)


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "/tmp/a.safetensors", "x.safetensors"]
)
def test_shards_are_names_not_paths(checkpoint, shard):
    def move(raw):
        raw["shards"][shard] = raw["shards"].pop(SHARDS[0])

    edit(checkpoint / "manifest.json", move)
    assert "manifest.json shards" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[]", "{", "[" * 5000, "null", b"\xff\xfe"])
def test_malformed_json_is_one_clear_error(checkpoint, name, content):
    raw = content if isinstance(content, bytes) else content.encode()
    (checkpoint / name).write_bytes(raw)
    assert name in refusal(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", SHARDS[0]])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert name in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 2}, "format_version is 2; this release reads 1"),
        ({"format_version": True}, "format_version is True"),
        ({"unknown": 1}, "unknown: Extra inputs"),
        ({"quant_method": "gptq"}, "quant_method 'svd'"),
    ],
)
def test_config_problems_are_named(checkpoint, change, expected):
    edit(checkpoint / "config.json", lambda raw: raw["quantization_config"].update(change))
    assert expected in refusal(checkpoint)


def test_artefacts_stay_within_their_matrix_and_head():
    raw = json.loads(CONFIG.model_dump_json())
    raw["modules"][f"{ATTENTION}.q_proj"]["rank"] = 7
    raw["modules"][f"{ATTENTION}.k_proj"]["a_tail"] = 9
    raw["modules"][f"{MLP}.gate_proj"]["group_columns"] = 6
    raw["modules"][f"{MLP}.up_proj"]["kept_in"] = 7
    raw["modules"][f"{MLP}.down_proj"] = {"kind": "sketch", **SHAPE}
    raw["kv"][ATTENTION] |= {"k_rank": 5, "mode": "during"}
    with pytest.raises(CheckpointFormatError) as refused:
        parse(raw, "here")
    message = str(refused.value)
    assert "rank 7 exceeds the matrix [8, 6]; the largest rank is 6" in message
    assert "tails of 9 columns and 2 rows exceed the matrix [8, 6]" in message
    assert "group_columns 6 is no multiple of dim 4" in message
    assert "[5, 7] exceeds the matrix [8, 6]" in message
    assert f"{MLP}.down_proj" in message
    for kind in ("'sketch'", *(f"'{module.kind}'" for module in CONFIG.modules.values())):
        assert kind in message
    assert "mode" in message and "'pre' or 'post'" in message


def test_a_dense_weight_beside_its_factors(checkpoint):
    replace(checkpoint, f"{ATTENTION}.q_proj.weight", torch.zeros(8, 6), "F32")
    assert "q_proj.weight: a dense weight beside the factors" in refusal(checkpoint)


def header(path: Path, entries: object, payload: bytes = b"") -> Path:
    raw = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {**ENTRY, "data_offsets": []}},
        {"a": {**ENTRY, "data_offsets": ["0", "8"]}},
        {"a": {**ENTRY, "data_offsets": [0.0, 8.0]}},
        {"a": {**ENTRY, "shape": [1000, 1000]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {**ENTRY, "data_offsets": [4, 12]}},
        "[" * 5000,
        "[]",
    ],
    ids=range(9),
)
def test_hostile_headers_are_damage_not_tracebacks(tmp_path, entries):
    with pytest.raises(ValueError, match=r"header|was expected|promises"):
        read_header(header(tmp_path / "x.safetensors", entries, b"\0" * 8))


def test_a_header_longer_than_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ValueError, match="claims 1099511627776 bytes of a 10-byte file"):
        read_header(path)
