"""Check a checkpoint directory against its own config and manifest before any tensor is read."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.config import SvdCheckpointConfig, read, read_json
from vllm_svd.format.dtypes import DTYPE_BYTES, MODEL_DTYPES
from vllm_svd.format.manifest import (
    INDEX_FILE,
    Manifest,
    TensorEntry,
    read_header,
    read_manifest,
    sha256,
)

# Endings of names that only compression adds: found without a module of config.json, they are
# left over from another.
_BASES = (".attn.k_down", ".attn.k_up", ".attn.v_down", ".attn.v_up")
_ADDED = (
    *(".A", ".B", ".A_int8", ".A_scale", ".A_tail", ".B_int8", ".B_scale", ".B_tail"),
    *(".indices", ".codebooks", ".scales", ".reduced", ".rows", ".columns", ".correction"),
    *(".U", ".V", ".U_count", ".V_count", ".U_bitmap", ".V_bitmap", ".scale"),
    *_BASES,
)


def verify(directory: Path, *, contents: bool = True) -> SvdCheckpointConfig:
    """Verify headers (and with `contents` the SHA-256 of every shard) of a checkpoint.

    Raises CheckpointFormatError that lists every problem found, never only the first.
    """
    config = read(directory)
    manifest = read_manifest(directory)
    problems = [
        *_config_against_manifest(config, manifest),
        *_index_against_manifest(directory, manifest),
        *_files_against_manifest(directory, manifest),
    ]
    headers, damaged = _headers(directory, manifest)
    problems += [f"{shard}: damaged, {how}" for shard, how in damaged.items()]
    problems += _headers_against_manifest(headers, manifest)
    if contents:
        problems += _contents_against_manifest(directory, manifest, list(headers))
    if problems:
        raise CheckpointFormatError(
            str(directory), problems, "copy the checkpoint again, or compress the model again"
        )
    return config


def _config_against_manifest(config: SvdCheckpointConfig, manifest: Manifest) -> list[str]:
    problems = []
    expected = config.tensors()
    for name, (shape, dtype) in expected.items():
        record = manifest.tensors.get(name)
        if record is None:
            problems.append(f"{name}: promised by config.json, absent from the manifest")
            continue
        if record.shape != shape:
            problems.append(f"{name}: shape {list(record.shape)}, config.json says {list(shape)}")
        if record.dtype not in ((dtype,) if dtype else MODEL_DTYPES):
            accepted = dtype or ", ".join(MODEL_DTYPES)
            problems.append(f"{name}: dtype {record.dtype}, config.json says {accepted}")
    dense = {name: record for name, record in manifest.tensors.items() if name not in expected}
    for name in sorted(config.replaced() & dense.keys()):
        problems.append(f"{name}: a dense weight beside the factors that replace it")
    # Another method has names and dtypes of its own.
    added = _BASES if config.weights else _ADDED
    for name in sorted(dense):
        if name.endswith(added):
            problems.append(f"{name}: not named by config.json")
    of_dense = tuple(DTYPE_BYTES) if config.weights else MODEL_DTYPES
    odd = {record.dtype for record in dense.values() if record.dtype not in of_dense}
    odd |= {record.dtype for record in manifest.tensors.values()} - DTYPE_BYTES.keys()
    if odd:
        problems.append(
            f"dtypes {sorted(odd)} are not accepted; accepted are {', '.join(of_dense)}"
        )
    return problems


def _index_against_manifest(directory: Path, manifest: Manifest) -> list[str]:
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if weight_map != {name: record.shard for name, record in manifest.tensors.items()}:
        return [f"{INDEX_FILE} and the manifest disagree on which shard holds which tensor"]
    return []


def _files_against_manifest(directory: Path, manifest: Manifest) -> list[str]:
    found = {path.name for path in directory.glob("*.safetensors")}
    return [
        *(f"{shard}: missing" for shard in sorted(manifest.shards.keys() - found)),
        *(
            f"{name}: the manifest names no such shard"
            for name in sorted(found - manifest.shards.keys())
        ),
    ]


def _headers(
    directory: Path, manifest: Manifest
) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, str]]:
    """Headers of the intact shards, and what is wrong with the damaged ones."""
    headers, damaged = {}, {}
    for shard, record in manifest.shards.items():
        path = directory / shard
        if not path.is_file():
            continue
        try:
            headers[shard] = read_header(path)
        except ValueError as error:
            damaged[shard] = str(error)
        else:
            if (size := path.stat().st_size) != record.bytes:
                damaged[shard] = f"{size} bytes long where the manifest says {record.bytes}"
    return headers, damaged


def _headers_against_manifest(
    headers: Mapping[str, Mapping[str, TensorEntry]], manifest: Manifest
) -> list[str]:
    problems = []
    for shard, entries in headers.items():
        expected = {name for name, record in manifest.tensors.items() if record.shard == shard}
        problems += [f"{name}: missing from {shard}" for name in sorted(expected - entries.keys())]
        problems += [
            f"{name}: in {shard}, where the manifest has no such tensor"
            for name in sorted(entries.keys() - expected)
        ]
        for name in sorted(expected & entries.keys()):
            record, entry = manifest.tensors[name], entries[name]
            if (entry.dtype, entry.shape) != (record.dtype, record.shape):
                problems.append(
                    f"{name}: {entry.dtype} {list(entry.shape)} in {shard}, "
                    f"the manifest says {record.dtype} {list(record.shape)}"
                )
    return problems


def _contents_against_manifest(directory: Path, manifest: Manifest, intact: list[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda shard: sha256(directory / shard), intact)
        return [
            f"{shard}: its contents changed after it was written (SHA-256 differs)"
            for shard, digest in zip(intact, digests, strict=True)
            if digest != manifest.shards[shard].sha256
        ]
