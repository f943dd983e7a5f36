"""The dense model to compress: resolved, of a supported family, and complete before it is read."""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from offline_compress.families import Family, family_of, respect_soft_caps, unfuse
from offline_compress.weights.hub import COMPANIONS, resolve
from offline_compress.weights.quantised import Quantised, check_method, quantised_layers
from offline_compress.weights.shards import (
    HEAD,
    TORCH_DTYPES,
    DType,
    Headers,
    Shards,
    SourceError,
    item_bytes,
    listed,
    misfits,
    open_shards,
)
from vllm_svd.format import QUANT_METHOD
from vllm_svd.format.dtypes import DTYPE_BYTES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Source:
    """A dense model: `shapes` of every tensor it holds, by its config alone.

    `stored` is where and how each is on disk; None while only the config of a hub model is here.
    `quantised` are the linear layers that another method stores its way: they are read as the dense
    weights that they stand for, and copied as they are.
    """

    name: str
    directory: Path
    config: PretrainedConfig
    family: Family
    dtype: DType
    shapes: dict[str, tuple[int, ...]]
    stored: Shards | None
    quantised: Quantised | None = None

    @property
    def public_name(self) -> str:
        """The hub id, or the last part of a local path: no directory of this machine."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.is_dir() else self.name

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored weight."""
        return item_bytes(self.dtype)

    def linears(self) -> dict[str, tuple[int, int]]:
        """[m, n] of every compressible linear layer, in execution order."""
        return {path: _matrix(self.shapes, path) for path in self.family.linear_paths(self.config)}

    def dtype_of(self, name: str) -> DType:
        """The dtype of a tensor on disk, or the model's while its header is not here."""
        return cast(DType, self.stored.headers[name][0]) if self.stored else self.dtype

    def on_disk(self, name: str) -> Headers:
        """What is stored of a tensor: itself, in the model's dtype while its header is not here.

        Of a quantised weight, all its parts.
        """
        if self.stored is None:
            return {name: (self.dtype, self.shapes[name])}
        path = self._quantised(name)
        parts = self.quantised.parts(path) if self.quantised and path else [name]
        return {part: self.stored.headers[part] for part in parts}

    def bytes_of(self, name: str) -> int:
        """The size of a tensor on disk."""
        return sum(math.prod(s) * DTYPE_BYTES[dtype] for dtype, s in self.on_disk(name).values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored; raises SourceError if its shard is damaged.

        A quantised weight is made whole, in fp32.
        """
        path = self._quantised(name)
        if self.quantised and path:
            return self.quantised.dense(path, self.read_stored)
        return self.read_stored(name)

    def read_stored(self, name: str) -> torch.Tensor:
        """One tensor of `on_disk`; raises SourceError if its shard is damaged."""
        if self.stored is None:
            raise SourceError(f"the weights of {self.name} are not here\nRemedy: fetch them first")
        return self.stored.read(name)

    def _quantised(self, name: str) -> str | None:
        """The path of the quantised layer whose weight is called `name`."""
        path = name.removesuffix(".weight")
        return path if self.quantised and path in self.quantised.shapes else None

    def companions(self) -> Iterator[Path]:
        """Tokenizer, generation config and licence files, in a fixed order."""
        found = {path for pattern in COMPANIONS for path in self.directory.glob(pattern)}
        yield from sorted(path for path in found if path.is_file())


def open_source(model: str, *, weights: bool = True, quantised: bool = False) -> Source:
    """Resolve MODEL, a directory or a hub id, and check it against its own config.

    Without `weights` only the config and tokenizer of a hub model are fetched. A model whose
    weights another method quantised is accepted where it may be `quantised`. Raises SourceError, or
    UnsupportedModelError for another architecture.
    """
    directory = resolve(model, weights)
    config, quantization = _config(directory)
    if quantization and not quantised:
        raise SourceError(
            f"{directory} is quantised ({quantization.get('quant_method')})\n"
            "Remedy: give the model it was quantised from, in bfloat16, float16 or float32; of a "
            "quantised one only the K/V cache can be projected, with run --kv-only"
        )
    if quantization:
        check_method(quantization)
    family = family_of(config)
    shapes = _shapes(directory, config)
    dtype = _NAMES.get(config.dtype) if config.dtype is not None else None
    stored = packed = None
    if weights or Path(model).expanduser().is_dir():
        stored = open_shards(directory)
        headers = stored.headers
        if quantization:
            linears = {path: _matrix(shapes, path) for path in family.linear_paths(config)}
            packed = quantised_layers(quantization, linears, headers, shapes)
            headers = packed.dense_headers(dtype or "F32")
        if problems := misfits(shapes, headers) or _untied(config, stored):
            raise SourceError(
                f"{directory} is not the model that its config.json describes:{listed(problems)}\n"
                "Remedy: copy the model again, config.json and every shard of it"
            )
        if packed and any(stored.read(name).any() for name in packed.surplus_biases):
            raise SourceError(
                f"{directory} stores biases that are not zero, of layers that have none in its "
                "config.json\nRemedy: copy config.json again"
            )
        dtype = dtype or stored_dtype(headers)
    return Source(model, directory, config, family, dtype or "F32", shapes, stored, packed)


def stored_dtype(headers: Headers) -> DType:
    """Of a model whose config.json names none: that of its embedding."""
    return cast(DType, headers[_EMBEDDING][0])


def model_config(directory: Path) -> PretrainedConfig:
    """config.json as transformers reads it; raises SourceError with what transformers says."""
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise _refused(directory, error) from None


def meta_model(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """The dense model on the meta device, its experts, if any, as linear layers of their own.

    Raises SourceError if `config` does not make one.
    """
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # transformers writes the dtype into it
                dtype=dtype,
                trust_remote_code=False,
            )
    except Exception as error:  # as above
        raise _refused(directory, error) from None
    unfuse(model, family_of(config))
    respect_soft_caps(model)
    return model


def _refused(directory: Path, error: Exception) -> SourceError:
    said = f"{type(error).__name__}: {error}"  # a KeyError's text alone is no message
    return SourceError(
        f"{directory}/config.json is not one transformers accepts: {said}\n"
        "Remedy: give a Llama, Mistral, Gemma 2, Qwen2, Qwen3 or Qwen3-MoE model with its own "
        "config.json"
    )


def _matrix(shapes: Mapping[str, tuple[int, ...]], path: str) -> tuple[int, int]:
    out_features, in_features = shapes[f"{path}.weight"]
    return out_features, in_features


def _config(directory: Path) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """config.json as transformers reads it, and apart from it another method's quantisation."""
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
    if not isinstance(quantization, dict | None):
        raise SourceError(
            f"{directory}/config.json: quantization_config is {quantization!r}; an object was "
            "expected\nRemedy: copy it again"
        )
    if quantization and quantization.get("quant_method") == QUANT_METHOD:
        raise SourceError(
            f"{directory} is already compressed\n"
            "Remedy: compress the dense model it came from, or make a dense one with "
            "offline-compress restore"
        )
    config = model_config(directory)
    if quantization:
        del config.quantization_config  # transformers would look for the library that wrote it
    return config, quantization


def _shapes(directory: Path, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, from its config alone."""
    model = meta_model(directory, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD)
    return shapes


def _untied(config: PretrainedConfig, stored: Shards) -> list[str]:
    """transformers keeps a stored head that differs from the embedding; vLLM drops it."""
    if not config.tie_word_embeddings or HEAD not in stored.headers:
        return []
    head, embedding = stored.read(HEAD), stored.read(_EMBEDDING)
    if head.shape == embedding.shape and torch.equal(head.float(), embedding.float()):
        return []
    return [
        f"{HEAD} differs from {_EMBEDDING} where config.json ties the two: set "
        "tie_word_embeddings to false in config.json to keep it, or remove it from the shard"
    ]
