"""The dense model that deltas are differences from, told from any other by its weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from offline_compress.weights.shards import SourceError
from offline_compress.weights.source import Source, open_source
from vllm_svd.format import SvdCheckpointConfig
from vllm_svd.format.config import BaseReference


def reference_to(base: Source, paths: Iterable[str]) -> BaseReference:
    """The base as a checkpoint names it; reads the weights at `paths`."""
    return BaseReference(name=base.public_name, sha256=_digest(base, paths))


def open_base(config: SvdCheckpointConfig, given: str | Path | None) -> Source:
    """The base of a checkpoint with deltas: `given`, or else what its config names.

    Raises SourceError if it cannot be found, or if its weights are not those the deltas were taken
    from.
    """
    assert config.base is not None  # the format demands it beside deltas
    name = str(given or config.base.name)
    try:
        base = open_source(name)
    except SourceError as error:
        if given is not None:
            raise
        raise SourceError(
            f"this checkpoint holds differences from {name}, which was not found: {error}\n"
            "Remedy: give the directory of that model with --base"
        ) from None
    if _digest(base, config.deltas) != config.base.sha256:
        raise SourceError(
            f"{name} is not the model that the deltas were taken from: its weights differ from "
            f"those of {config.base.name}\nRemedy: give that model with --base"
        )
    return base


def _digest(base: Source, paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = f"{path}.weight"
        if name not in base.shapes:
            raise SourceError(f"{base.name} has no {name}\nRemedy: give the right --base")
        digest.update(base.read(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
