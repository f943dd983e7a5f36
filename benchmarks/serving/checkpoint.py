"""What a checkpoint directory says of itself: bytes on disk, KV bytes per token, perplexity."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.results import Quality

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BITS = {"fp8_e4m3": 8, "int8": 8, "int4": 4, "int2": 2}


def weight_bytes(directory: Path) -> int:
    """Bytes of all safetensors files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def kv_bytes_per_token(directory: Path) -> int:
    """Exact bytes of K and V of one token over all layers, in the checkpoint's dtype or in tiers.

    Raises BenchmarkError where config.json lacks a field or holds one that is not accepted.
    """
    config = read_config(directory)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    try:
        return _cached_bytes(config, _DTYPE_BYTES[dtype])
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        if dtype not in _DTYPE_BYTES:
            problem = f"dtype {dtype!r}; accepted are {', '.join(_DTYPE_BYTES)}"
        raise BenchmarkError(
            f"{directory}/config.json is not that of a decoder: {problem}.\n"
            "Remedy: give a Hugging Face model directory or one that offline-compress wrote."
        ) from None


def _cached_bytes(config: dict[str, Any], item_bytes: int) -> int:
    """K and V of one token over all layers."""
    layers = config["num_hidden_layers"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    projected = (config.get("quantization_config") or {}).get("kv") or {}
    latents = sum(
        layer["num_kv_heads"] // layer.get("group", 1) * _latent_bytes(layer, item_bytes)
        for layer in projected.values()
    )
    return int(latents + (layers - len(projected)) * heads * 2 * head_dim * item_bytes)


def _latent_bytes(layer: dict[str, Any], item_bytes: int) -> int:
    """Of one token and group.

    Codes of every tier take whole words, and scales of one byte what these leave, or more words.
    """
    tiers = [*layer.get("k_tiers", ()), *layer.get("v_tiers", ())]
    if not tiers:
        return int((layer["k_rank"] + layer["v_rank"]) * item_bytes)
    codes = [int(tier["channels"]) * _STORED_BITS[tier["store"]] // 8 for tier in tiers]
    whole = sum(-(-size // 4) * 4 for size in codes)
    behind = max(0, len(tiers) - (whole - sum(codes)))
    return whole + -(-behind // 4) * 4


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; raises BenchmarkError where the directory is no checkpoint."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{directory} is not a checkpoint: config.json cannot be read ({error}).\n"
            "Remedy: give a Hugging Face model directory or one that offline-compress wrote."
        ) from None
    return config


def evaluate(directory: Path, text: Path, log: Path) -> Quality:
    """Perplexity over `text` from `offline-compress evaluate`, run as a process of its own."""
    script = Path(sys.executable).with_name("offline-compress")
    arguments = [str(script), "evaluate", str(directory), "--text", str(text), "--json"]
    spelled = " ".join(["offline-compress", *arguments[1:]])
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchmarkError(
            f"{script} is missing.\nRemedy: pip install -e . in this environment (make setup)."
        ) from None
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stderr + done.stdout)
    if done.returncode == 0:
        try:
            return Quality.model_validate_json(done.stdout)
        except ValidationError as error:
            raise BenchmarkError(f"{spelled} printed no perplexity: {error}") from None
    ending = "\n".join(f"  {row}" for row in done.stderr.splitlines()[-15:])
    raise BenchmarkError(
        f"{spelled} exited with {done.returncode}:\n{ending}\nThe whole log: {log}"
    )
