"""docs/methods.md, made from the methods and allocators themselves: `python -m
offline_compress.catalogue > docs/methods.md`.
"""

import inspect
from collections.abc import Iterator

from pydantic import BaseModel

from offline_compress.allocation import ALLOCATORS, Asks, KVBudget
from offline_compress.calibration import GRADIENTS, SHIFTED, Needs
from offline_compress.methods import METHODS, Method, OfferingMethod
from offline_compress.planning import accepts

_REQUIRED = {"impart": {"base": "BASE"}}  # an option without a default, for the sake of the table


def markdown() -> str:
    """The whole page."""
    methods = [cls(**_REQUIRED.get(name, {})) for name, cls in METHODS.items()]
    return "\n".join(
        [
            "# Methods and allocators",
            "",
            "Made by `python -m offline_compress.catalogue` from the code; a test compares them.",
            "`weights.method` and `weights.allocator` of a recipe take a name, or a mapping of",
            "`name` and the options below. One file each in offline_compress/methods and",
            "offline_compress/allocation, with the equations.",
            "",
            "## Methods",
            "",
            "| name | paper | statistics | passes of the model | stored as | use it when |",
            "|---|---|---|---|---|---|",
            *(_row(method) for method in methods),
            "",
            "Statistics: x is the input of a layer in the dense model, x' in the model compressed",
            "so far, g the gradient of the loss at its output. gram E[x x^T], shifted_gram",
            "E[x' x'^T], shift E[(x - x') x'^T], fisher the squared gradient of a sample summed",
            "over rows, output_gram E[g g^T]. Every method also takes one pass to advance the",
            "dense and the compressed model, and one to measure errors on held-out text.",
            "",
            *(line for method in methods for line in _section(type(method), _cost(method))),
            "## Allocators",
            "",
            "| name | source | measures first | works with |",
            "|---|---|---|---|",
            *(
                f"| `{name}` | {cls.paper} | {', '.join(sorted(cls().asks)) or 'nothing'} | "
                f"{_partners(cls().asks)} |"
                for name, cls in ALLOCATORS.items()
            ),
            "",
            *(line for cls in ALLOCATORS.values() for line in _section(cls, "")),
            "## K/V caches",
            "",
            "`kv` of a recipe, beside any method; equations in offline_compress/kv.",
            "",
            *_described(KVBudget),
            "First and last layers are no special case: `measured` gives every layer what its own",
            "probe asks for. Nor are attention sinks: all positions are stored alike, for on the",
            "example model the first positions gain less by being exact than all gain by the same",
            "bytes (benchmarks/results/amd-epyc-2-cores; `--kv-exact` of `python -m",
            "benchmarks.offline quality` asks it of another model).",
            "",
        ]
    )


def _row(method: Method) -> str:
    return (
        f"| `{method.name}` | {method.paper} | {', '.join(sorted(_needs(method))) or 'none'} | "
        f"{_passes(method)} | {method.artefact} | {method.when} |"
    )


def _needs(method: Method) -> Needs:
    """Of the method, and of what it tells its allocator."""
    return method.needs | (method.menu_needs if isinstance(method, OfferingMethod) else frozenset())


def _passes(method: Method) -> str:
    passes = "none" if not method.needs else "one forward"
    if method.needs & SHIFTED:
        passes = "one forward of each model per stage of a block (4)"
    if isinstance(method, OfferingMethod):
        passes += ", one before it"
    if method.needs & GRADIENTS:
        passes += ", one backward"
    return passes


def _cost(method: Method) -> str:
    return f"Allocator unless another is named: `{method.allocator}`."


def _partners(asks: frozenset[Asks]) -> str:
    partners = [name for name, cls in METHODS.items() if accepts(cls, asks)]
    return "every method" if len(partners) == len(METHODS) else f"`{'`, `'.join(partners)}`"


def _section(cls: type[BaseModel], note: str) -> Iterator[str]:
    """What the class says of itself, and its options with their defaults."""
    yield f"### {cls.model_fields['name'].default}"
    yield ""
    yield from _described(cls)
    if note:
        yield note
        yield ""


def _described(cls: type[BaseModel]) -> Iterator[str]:
    yield inspect.cleandoc(cls.__doc__ or "")
    yield ""
    options = {name: f for name, f in cls.model_fields.items() if name != "name"}
    if options:
        shown = (
            f"`{name}` (required)" if option.is_required() else f"`{name}` = {option.default!r}"
            for name, option in options.items()
        )
        yield f"Options: {', '.join(shown)}."
        yield ""


if __name__ == "__main__":
    print(markdown(), end="")
