"""What the laboratory compares of K/V caches: recipes of ours, and dense caches quantised alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from benchmarks.offline.compare import Scored
from benchmarks.offline.points import Point
from offline_compress import reference
from offline_compress.families import family_of, head_dim, layer_paths
from offline_compress.kv import KVBases, rotation
from offline_compress.progress import Progress
from offline_compress.recipe import RecipeError
from vllm_svd.format import KVProjection, Store, Tier

Recipe = dict[str, Any]
_STORE: TypeAdapter[Store] = TypeAdapter(Store)


class Wanted(NamedTuple):
    """A point to measure: name, share of the dense bytes, recipe, and what CacheGrid.exact says."""

    name: str
    kept: float
    recipe: Recipe
    exact: int = 0


@dataclass(frozen=True)
class CacheGrid:
    """Every combination of ours, and the bits of a dense cache that is only quantised.

    `exact` first positions of each scored window are held as the dense model has them: what
    attention sinks lose by being stored like other tokens. Their bytes are not counted.
    """

    modes: Sequence[str]
    kept: Sequence[float]
    groups: Sequence[int]
    stores: Sequence[str]
    allocators: Sequence[str]
    exact: Sequence[int]
    quantised: Sequence[str]

    def wanted(self, how: dict[str, Any]) -> Iterator[Wanted]:
        """The weights stay dense. Raises RecipeError for exact positions of rotated keys."""
        if any(self.exact) and "post" in self.modes:
            problem = "--kv-exact: rotated keys (--kv-mode post) have no exact ones beside them"
            raise RecipeError("the command line", [problem])
        axes = self.modes, self.groups, self.stores, self.allocators, self.exact, self.kept
        for mode, group, store, allocator, exact, kept in product(*axes):
            cache = {
                "kept": kept,
                "mode": mode,
                "group": group,
                "store": store,
                "allocator": allocator,
            }
            recipe = {"weights": {"kept": 1.0}, "kv": cache, "calibration": how}
            yield Wanted(self._name(mode, group, store, allocator, exact), kept, recipe, exact)

    def baselines(self) -> list[Store]:
        """Raises RecipeError for a store that is not known."""
        try:
            return [_STORE.validate_python(store) for store in self.quantised]
        except ValidationError:
            given, accepted = ", ".join(self.quantised), ", ".join(get_args(Store))
            problem = f"--kv-quantised {given}: accepted are {accepted}"
            raise RecipeError("the command line", [problem]) from None

    @staticmethod
    def _name(mode: str, group: int, store: str, allocator: str, exact: int) -> str:
        words = [f"kv {mode}", f"group {group}", store, allocator, f"exact {exact}"]
        defaults = ["", "group 1", "model", "uniform", "exact 0"]
        return " ".join(word for word, dense in zip(words, defaults, strict=True) if word != dense)


def quantised_point(
    store: Store,
    directory: Path,
    dense: PreTrainedModel,
    checkpoint_bytes: int,
    item_bytes: int,
    texts: Sequence[Scored],
    batch: int,
    progress: Progress,
) -> Point:
    """The dense model with its keys and values in few bits, a scale for every token and head.

    Keys are quantised behind RoPE, as servers do; both are rotated within the head first, and the
    scale is that of least error, which most servers leave out: the baseline at its best. Its bytes
    are those of codes and scales alone, whatever a server would fill up.
    """
    model = reference.load(directory, dense.device, dense.dtype)
    config, family = model.config, family_of(model.config)
    bases = _rotated(config.num_key_value_heads, head_dim(config), store)
    paths = layer_paths(config)
    for path in paths:
        reference.install_kv(model.get_submodule(path), family, path, bases)
    found = {text.name: text.compare(dense, model, batch, progress) for text in texts}
    tiers = (*bases.config.k_tiers, *bases.config.v_tiers)
    size = bases.config.groups * sum(tier.bytes for tier in tiers) * len(paths)
    whole = 2 * config.num_key_value_heads * head_dim(config) * item_bytes * len(paths)
    perplexity = next(iter(found.values())).perplexity
    return Point(
        method=f"quantised {store}",
        kept=size / whole,
        checkpoint_bytes=checkpoint_bytes,
        linear_bytes=0,
        kv_bytes_per_token=size,
        predicted=None,
        held_out=None,
        perplexity_run=perplexity,
        perplexity_reloaded=perplexity,
        texts=found,
        seconds=0.0,
        peak_bytes=0,
    )


def _rotated(heads: int, size: int, store: Store) -> KVBases:
    tiers = (Tier(channels=size, store=store),)
    projection = KVProjection(
        mode="post",
        num_kv_heads=heads,
        head_dim=size,
        k_rank=size,
        v_rank=size,
        k_tiers=tiers,
        v_tiers=tiers,
    )
    down = rotation(size).expand(heads, size, size)
    return KVBases(projection, down, down.mT, down, down.mT).to(torch.float32)
