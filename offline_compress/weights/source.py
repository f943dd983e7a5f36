"""The dense model to compress: resolved, of a supported family, and complete before it is read."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from offline_compress.families import Family, family_of
from vllm_svd.errors import SvdError
from vllm_svd.format import QUANT_METHOD
from vllm_svd.format.manifest import read_header

DType = Literal["BF16", "F16", "F32"]
TORCH_DTYPES: dict[DType, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# Files beside the weights that the compressed checkpoint carries as they are.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def item_bytes(dtype: DType) -> int:
    """Bytes of one element."""
    return TORCH_DTYPES[dtype].itemsize


class SourceError(SvdError):
    """A MODEL that is not a complete dense checkpoint in safetensors."""


Headers = dict[str, tuple[DType, tuple[int, ...]]]


@dataclass(frozen=True)
class Source:
    """A dense model: `shapes` of every tensor it holds, by its config alone.

    `stored` gives the dtype and shape of each on disk and `shards` the file that holds it; both
    are empty while only the config of a hub model is here.
    """

    name: str
    directory: Path
    config: PretrainedConfig
    family: Family
    dtype: DType
    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, Path]
    stored: Headers

    @property
    def public_name(self) -> str:
        """The hub id, or the last part of a local path: no directory of this machine."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.is_dir() else self.name

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def linears(self) -> dict[str, tuple[int, int]]:
        """[m, n] of every compressible linear layer, in execution order."""
        found = {}
        for path in self.family.linear_paths(self.config):
            out_features, in_features = self.shapes[f"{path}.weight"]
            found[path] = (out_features, in_features)
        return found

    def dtype_of(self, name: str) -> DType:
        """The dtype of a tensor on disk, or the model's while its header is not here."""
        return self.stored[name][0] if name in self.stored else self.dtype

    def bytes_of(self, name: str) -> int:
        """The size of a tensor on disk."""
        return math.prod(self.shapes[name]) * item_bytes(self.dtype_of(name))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored; raises SourceError if its shard is damaged."""
        with shard_errors(self.directory), safe_open(self.shards[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def companions(self) -> Iterator[Path]:
        """Tokenizer, generation config and licence files, in a fixed order."""
        found = {path for pattern in COMPANIONS for path in self.directory.glob(pattern)}
        yield from sorted(path for path in found if path.is_file())


def open_source(model: str, *, weights: bool = True) -> Source:
    """Resolve MODEL, a directory or a hub id, and check it against its own config.

    Without `weights` only the config of a hub model is fetched. Raises SourceError, or
    UnsupportedModelError for another architecture.
    """
    directory = _resolve(model, weights)
    config = _config(directory)
    family = family_of(config)
    shapes = _shapes(config)
    local = sorted(directory.glob("*.safetensors"))
    shards: dict[str, Path] = {}
    stored: Headers = {}
    dtype = _NAMES.get(config.dtype) if config.dtype is not None else None
    if local or weights:
        shards, stored = _headers(directory, local)
        _complete(directory, shapes, stored)
        dtype = dtype or stored[next(family.linear_paths(config)) + ".weight"][0]
    return Source(model, directory, config, family, dtype or "F32", shapes, shards, stored)


@contextmanager
def shard_errors(directory: Path) -> Iterator[None]:
    """Turn what safetensors says of a damaged shard into a SourceError."""
    try:
        yield
    except SafetensorError as error:
        raise SourceError(
            f"the weights of {directory} cannot be read: {error}\nRemedy: copy the model again"
        ) from None


def _resolve(model: str, weights: bool) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SourceError(
            f"MODEL {model} is a file\nRemedy: give the directory that holds config.json"
        )
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
    if not hub_id or model.startswith((".", "~")) or ("/" in model and path.parent.is_dir()):
        raise SourceError(
            f"MODEL {model}: no such directory\n"
            "Remedy: give a directory that holds config.json and *.safetensors, or a hub id such "
            "as Qwen/Qwen3-0.6B"
        )
    patterns = ["*.json", *COMPANIONS, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"MODEL {model} is neither a directory here nor could it be fetched from the hub: "
            f"{first}\nRemedy: check the name and the network, or give a local directory"
        ) from None


def _config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise SourceError(
            f"{directory} holds no config.json\nRemedy: give the directory of a Hugging Face model"
        )
    try:
        raw = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{directory}/config.json cannot be read: {error}\nRemedy: copy the model again"
        ) from None
    if not isinstance(raw, dict):
        raise SourceError(f"{directory}/config.json is not a JSON object\nRemedy: copy it again")
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise SourceError(
            f"{directory} is already compressed\n"
            "Remedy: compress the dense model it came from, or make a dense one with "
            "offline-compress restore"
        )
    if quantization:
        raise SourceError(
            f"{directory} is quantised ({quantization.get('quant_method')})\n"
            "Remedy: give the model it was quantised from, in bfloat16, float16 or float32"
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SourceError(
            f"{directory}/config.json is not one transformers knows: {error}\n"
            "Remedy: give a Llama, Mistral, Qwen2 or Qwen3 model"
        ) from None


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, from its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def _headers(directory: Path, local: list[Path]) -> tuple[dict[str, Path], Headers]:
    """Where every tensor is, and its dtype and shape."""
    if not local:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        found = f"only {', '.join(pickles)}: pickles are never loaded" if pickles else "none"
        raise SourceError(
            f"{directory} holds no *.safetensors ({found})\n"
            "Remedy: give a model in safetensors, or convert it with its save_pretrained"
        )
    shards: dict[str, Path] = {}
    stored: Headers = {}
    problems = []
    for path in local:
        try:
            for name, entry in read_header(path).items():
                shards[name] = path
                stored[name] = (entry["dtype"], tuple(entry["shape"]))
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} is damaged: {error}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise SourceError(f"{directory} cannot be read:{listed}\nRemedy: copy the model again")
    return shards, stored


def _complete(directory: Path, shapes: dict[str, tuple[int, ...]], stored: Headers) -> None:
    problems = []
    for name, shape in shapes.items():
        if name not in stored:
            problems.append(f"{name}: missing")
            continue
        dtype, found = stored[name]
        if found != shape:
            problems.append(f"{name}: shape {list(found)}, config.json makes it {list(shape)}")
        if dtype not in TORCH_DTYPES:
            problems.append(f"{name}: dtype {dtype}; accepted are {', '.join(TORCH_DTYPES)}")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        listed = "".join(f"\n  - {problem}" for problem in shown)
        raise SourceError(
            f"{directory} is not the model that its config.json describes:{listed}\n"
            "Remedy: copy the model again, every shard of it"
        )
