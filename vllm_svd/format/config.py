"""`quantization_config` of config.json: the only contract between the two packages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.kv import KVProjection
from vllm_svd.format.linear import Stored
from vllm_svd.format.modules import Module

FORMAT_VERSION = 1
QUANT_METHOD = "svd"
_MODULE: TypeAdapter[Module] = TypeAdapter(Module)


class BaseReference(BaseModel):
    """The dense model that deltas are differences from.

    `sha256` is of the bytes of its weights that have deltas, in the order of their names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str


class SvdCheckpointConfig(BaseModel):
    """Which modules are compressed, and how.

    `modules` is keyed by the Hugging Face path of a linear layer, `kv` by that of an attention
    layer. Every rank is here, not in a side file: vLLM keys its compile cache by config.json.
    `weights` is the quantization_config of another method, which stores the linear layers its way.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["svd"] = "svd"
    format_version: Literal[1] = 1
    method: str = Field(min_length=1)
    modules: dict[str, Module] = {}
    kv: dict[str, KVProjection] = {}
    base: BaseReference | None = None
    weights: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _weights_are_of_one_method(self) -> "SvdCheckpointConfig":
        if self.weights is None:
            return self
        if self.modules:
            raise ValueError("`modules` beside `weights`, which another method has quantised")
        if self.weights.get("quant_method") in (None, QUANT_METHOD):
            raise ValueError("`weights` names no other quant_method than svd")
        return self

    @model_validator(mode="after")
    def _deltas_have_a_base(self) -> "SvdCheckpointConfig":
        if self.deltas and self.base is None:
            raise ValueError("deltas without `base`, the model that they are differences from")
        return self

    @property
    def deltas(self) -> list[str]:
        """Paths of the linear layers stored as differences from `base`, sorted."""
        return sorted(path for path, module in self.modules.items() if module.kind == "delta")

    def tensors(self) -> dict[str, Stored]:
        """Shape and dtype of every tensor that compression added, by name."""
        named: dict[str, Stored] = {}
        for path, module in self.modules.items():
            named |= module.tensors(path)
        for path, projection in self.kv.items():
            named |= projection.tensors(path)
        return named

    def replaced(self) -> set[str]:
        """Names of the dense weights that must be absent."""
        return {f"{path}.weight" for path in self.modules}


def parse(raw: Mapping[str, Any], where: str) -> SvdCheckpointConfig:
    """Validate a `quantization_config`; raises CheckpointFormatError with every problem."""
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointFormatError(
            where,
            [f"format_version is {version!r}; this release reads {FORMAT_VERSION}"],
            "compress the model again with this release, or install the release that wrote it",
        )
    try:
        return SvdCheckpointConfig.model_validate(raw)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'quantization_config'}: {item['msg']}"
            for item in error.errors()
        ]
        raise CheckpointFormatError(
            where, problems, "restore config.json as offline-compress wrote it"
        ) from None


def module_of(raw: Mapping[str, Any]) -> Module:
    """One entry of `modules`; raises pydantic's ValidationError."""
    found: Module = _MODULE.validate_python(raw)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointFormatError if absent or malformed."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}, not an object")
    except (OSError, UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        problem = f"{path.name} cannot be read: {error}"
        raise CheckpointFormatError(
            str(path.parent), [problem], "point at the directory offline-compress wrote"
        ) from None
    return value


def read(directory: Path) -> SvdCheckpointConfig:
    """The config of the svd checkpoint in `directory`."""
    raw = read_json(directory / "config.json").get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        raise CheckpointFormatError(
            str(directory),
            [f"config.json holds no quantization_config with quant_method {QUANT_METHOD!r}"],
            "this is a dense checkpoint or another format; compress it with offline-compress run",
        )
    return parse(raw, f"{directory}/config.json")
