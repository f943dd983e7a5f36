"""The safetensors files of a dense model: which ones count, and what their headers hold."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open

from vllm_svd.errors import SvdError
from vllm_svd.format.manifest import read_header

DType = Literal["BF16", "F16", "F32"]
TORCH_DTYPES: dict[DType, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"

Headers = dict[str, tuple[str, tuple[int, ...]]]
"""dtype, in safetensors' spelling, and shape of every tensor by its name."""


class SourceError(SvdError):
    """A MODEL that is not a complete dense checkpoint in safetensors."""


def item_bytes(dtype: DType) -> int:
    """Bytes of one element."""
    return TORCH_DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Shards:
    """Every stored tensor: the file that holds it, its dtype and its shape."""

    paths: dict[str, Path]
    headers: Headers

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored; raises SourceError if its shard is damaged."""
        path = self.paths[name]
        with shard_errors(path.parent), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


@contextmanager
def shard_errors(directory: Path) -> Iterator[None]:
    """Turn what safetensors says of a damaged or vanished shard into a SourceError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"the weights of {directory} cannot be read: {error}\nRemedy: copy the model again"
        ) from None


def indexed(directory: Path) -> dict[str, str]:
    """The shard of every tensor by the index; raises SourceError if the index is malformed."""
    path = directory / INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        odd = sorted({str(file) for file in weight_map.values() if not _is_shard_name(file)})
        if odd:
            raise ValueError(f"weight_map names {', '.join(odd)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{path} is not an index of safetensors files: {error!r}\nRemedy: copy it again"
        ) from None
    return cast(dict[str, str], weight_map)


def open_shards(directory: Path) -> Shards:
    """The headers of the files that transformers loads: model.safetensors, else the indexed ones.

    Raises SourceError with every damaged or missing file and every tensor stored twice.
    """
    located = _located(directory)
    headers: dict[str, Headers] = {}
    problems = []
    for file in sorted(set(located.values())) or [SINGLE]:
        try:
            entries = read_header(directory / file)
        except FileNotFoundError:
            problems.append(f"{file} is missing")
        except (OSError, ValueError) as error:
            problems.append(f"{file} is damaged: {error}")
        else:
            headers[file] = {n: (e.dtype, e.shape) for n, e in entries.items()}
    holders: dict[str, list[str]] = {}
    for file, entries_of in headers.items():
        for name in entries_of:
            holders.setdefault(name, []).append(file)
    problems += [
        f"{name} is in {' and in '.join(files)}"
        for name, files in holders.items()
        if len(files) > 1
    ]
    problems += [
        f"{name} is not in {file}, where {INDEX} has it"
        for name, file in located.items()
        if file in headers and name not in headers[file]
    ]
    if problems:
        raise SourceError(
            f"{directory} cannot be read:{listed(problems)}\nRemedy: copy the model again"
        )
    return Shards(
        {name: directory / files[0] for name, files in holders.items()},
        {name: entry for entries_of in headers.values() for name, entry in entries_of.items()},
    )


def misfits(shapes: Mapping[str, tuple[int, ...]], headers: Headers) -> list[str]:
    """What a model of these shapes misses in the headers, and what it has no place for."""
    expected = shapes.keys() | {HEAD}  # a head beside a tied embedding is compared with it
    problems = [
        f"{name}: not part of this model"
        for name in headers
        if name not in expected and not name.endswith("rotary_emb.inv_freq")  # old exports
    ]
    for name, shape in shapes.items():
        if name not in headers:
            problems.append(f"{name}: missing")
            continue
        dtype, found = headers[name]
        if found != shape:
            problems.append(f"{name}: shape {list(found)}, config.json makes it {list(shape)}")
        if dtype not in TORCH_DTYPES:
            problems.append(f"{name}: dtype {dtype}; accepted are {', '.join(TORCH_DTYPES)}")
    return problems


def listed(problems: list[str]) -> str:
    """One line each, the first eight of them."""
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    return "".join(f"\n  - {problem}" for problem in shown)


def _located(directory: Path) -> dict[str, str]:
    """The file of every tensor by the index; empty where one file holds them all."""
    if (directory / SINGLE).is_file():
        return {}
    if (directory / INDEX).is_file():
        return indexed(directory)
    names = sorted(path.name for path in directory.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        raise SourceError(
            f"{directory} holds {', '.join(shards)}, but neither {SINGLE} nor {INDEX}\n"
            "Remedy: copy the index from where the model came from"
        )
    pickles = [name for name in names if name.endswith(".bin")]
    found = f"only {', '.join(pickles)}: pickles are never loaded" if pickles else "none"
    raise SourceError(
        f"{directory} holds no *.safetensors ({found})\n"
        "Remedy: give a model in safetensors, or convert it with its save_pretrained"
    )


def _is_shard_name(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
