"""What the laboratory compares: a name and the `weights` section of a recipe."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offline_compress.methods import METHODS
from offline_compress.recipe import RecipeError

# Beside the nine methods with their own allocators, what tells their parts from one another.
_EXTRA: dict[str, dict[str, Any]] = {
    "asvd strs": {"method": "asvd", "allocator": "strs"},
    "svd_llm update": {"method": {"name": "svd_llm", "update": True}},
    "svd_llm recover": {"method": {"name": "svd_llm", "recover": {"steps": 100}}},
    "svd_llm water_filling": {"method": "svd_llm", "allocator": "water_filling"},
    "svd_llm_v2 uniform": {"method": "svd_llm_v2", "allocator": "uniform"},
    "dobi_svd uniform": {"method": "dobi_svd", "allocator": "uniform"},
    "dobi_svd 16 bit": {"method": {"name": "dobi_svd", "remap": False}},
    "gptvq 1d": {"method": {"name": "gptvq", "dim": 1}},
    "gptvq 4d": {"method": {"name": "gptvq", "dim": 4}},
}

# Of the differences from a base model.
_DELTAS: dict[str, dict[str, Any]] = {
    "impart": {},
    "impart 8 bit": {"bits": 8},
    "impart 4 bit": {"bits": 4},
}


def known(base: Path | None = None) -> dict[str, dict[str, Any]]:
    """Every variant by name; those of deltas where there is a base model."""
    own = {name: {"method": name} for name in METHODS if name != "impart"}
    if base is None:
        return own | _EXTRA
    deltas = {
        name: {"method": {"name": "impart", "base": str(base)} | options}
        for name, options in _DELTAS.items()
    }
    return own | _EXTRA | deltas


def chosen(names: Iterable[str] | None, base: Path | None = None) -> dict[str, dict[str, Any]]:
    """The variants of these names, or all; raises RecipeError with every unknown name."""
    every = known(base)
    if names is None:
        return every
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in every]:
        accepted = ", ".join(every) + ("" if base else ", and with --base impart")
        raise RecipeError(
            "the command line",
            [f"--method {name!r} is not known; accepted are {accepted}" for name in unknown],
        )
    return {name: every[name] for name in wanted}
