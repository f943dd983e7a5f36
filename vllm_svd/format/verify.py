"""Check a checkpoint directory against its own config and manifest before any tensor is read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.config import SvdCheckpointConfig, read, read_json
from vllm_svd.format.manifest import INDEX_FILE, Manifest, read_header, read_manifest, sha256


def verify(directory: Path, *, contents: bool = True) -> SvdCheckpointConfig:
    """Verify headers (and with `contents` the SHA-256 of every shard) of a checkpoint.

    Raises CheckpointFormatError that lists every problem found, never only the first.
    """
    config = read(directory)
    manifest = read_manifest(directory)
    problems = [
        *_config_against_manifest(config, manifest),
        *_index_against_manifest(directory, manifest),
    ]
    damaged = _shards_against_manifest(directory, manifest)
    problems += damaged
    if contents and not damaged:
        problems += _contents_against_manifest(directory, manifest)
    if problems:
        raise CheckpointFormatError(
            str(directory), problems, "copy the checkpoint again, or compress the model again"
        )
    return config


def _config_against_manifest(config: SvdCheckpointConfig, manifest: Manifest) -> list[str]:
    problems = []
    expected = config.tensors()
    for name, shape in expected.items():
        record = manifest.tensors.get(name)
        if record is None:
            problems.append(f"{name}: promised by config.json, absent from the manifest")
        elif record.shape != shape:
            problems.append(f"{name}: shape {list(record.shape)}, config.json says {list(shape)}")
    dense = {name: record for name, record in manifest.tensors.items() if name not in expected}
    for name in sorted(config.replaced() & dense.keys()):
        problems.append(f"{name}: a dense weight beside the factors that replace it")
    for name in sorted(dense):
        if name.endswith((".A", ".B")) or ".attn." in name:
            problems.append(f"{name}: not named by config.json")
    dtypes = {record.dtype for record in manifest.tensors.values()}
    if odd := sorted(dtypes - {"BF16", "F16", "F32"}):
        problems.append(f"dtypes {odd} are not accepted; accepted are BF16, F16, F32")
    return problems


def _index_against_manifest(directory: Path, manifest: Manifest) -> list[str]:
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if weight_map != {name: record.shard for name, record in manifest.tensors.items()}:
        return [f"{INDEX_FILE} and the manifest disagree on which shard holds which tensor"]
    return []


def _shards_against_manifest(directory: Path, manifest: Manifest) -> list[str]:
    problems = []
    for extra in sorted(
        {path.name for path in directory.glob("*.safetensors")} - manifest.shards.keys()
    ):
        problems.append(f"{extra}: a shard the manifest does not name")
    found: dict[str, str] = {}
    for shard in manifest.shards:
        path = directory / shard
        if not path.is_file():
            problems.append(f"{shard}: missing")
            continue
        try:
            entries = read_header(path)
        except ValueError as error:
            problems.append(f"{shard}: damaged, {error}")
            continue
        for name, entry in entries.items():
            found[name] = shard
            record = manifest.tensors.get(name)
            if record is None or record.shard != shard:
                problems.append(f"{name}: in {shard}, where the manifest has no such tensor")
            elif entry.get("shape") != list(record.shape) or entry.get("dtype") != record.dtype:
                problems.append(
                    f"{name}: {entry.get('dtype')} {entry.get('shape')} in {shard}, "
                    f"the manifest says {record.dtype} {list(record.shape)}"
                )
    damaged = {problem.partition(":")[0] for problem in problems}
    for name, record in manifest.tensors.items():
        if name not in found and record.shard not in damaged:
            problems.append(f"{name}: missing from {record.shard}")
    return problems


def _contents_against_manifest(directory: Path, manifest: Manifest) -> list[str]:
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda shard: sha256(directory / shard), manifest.shards)
        return [
            f"{shard}: its contents changed after it was written (SHA-256 differs)"
            for (shard, record), digest in zip(manifest.shards.items(), digests, strict=True)
            if digest != record.sha256
        ]
