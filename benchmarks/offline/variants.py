"""What the laboratory compares: a name and the `weights` section of a recipe."""

from collections.abc import Iterable
from typing import Any

from offline_compress.methods import METHODS
from offline_compress.recipe import RecipeError

# Beside the nine methods with their own allocators, what tells their parts from one another.
_EXTRA: dict[str, dict[str, Any]] = {
    "asvd strs": {"method": "asvd", "allocator": "strs"},
    "svd_llm update": {"method": {"name": "svd_llm", "update": True}},
    "svd_llm water_filling": {"method": "svd_llm", "allocator": "water_filling"},
    "svd_llm_v2 uniform": {"method": "svd_llm_v2", "allocator": "uniform"},
    "dobi_svd uniform": {"method": "dobi_svd", "allocator": "uniform"},
    "dobi_svd 16 bit": {"method": {"name": "dobi_svd", "remap": False}},
    "gptvq 1d": {"method": {"name": "gptvq", "dim": 1}},
    "gptvq 4d": {"method": {"name": "gptvq", "dim": 4}},
}


def known() -> dict[str, dict[str, Any]]:
    """Every variant that needs no base model, by name."""
    own = {name: {"method": name} for name in METHODS if name != "impart"}
    return own | _EXTRA


def chosen(names: Iterable[str] | None) -> dict[str, dict[str, Any]]:
    """The variants of these names, or all; raises RecipeError with every unknown name."""
    every = known()
    if names is None:
        return every
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in every]:
        accepted = ", ".join(every)
        raise RecipeError(
            "the command line",
            [f"--method {name!r} is not known; accepted are {accepted}" for name in unknown],
        )
    return {name: every[name] for name in wanted}
