"""CompressionRecipe: what the user wants, from YAML and command-line flags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from offline_compress.allocation import (
    ALLOCATORS,
    AllocatorConfig,
    Kept,
    KVBudget,
    LayerOverride,
    Uniform,
)
from offline_compress.methods import METHODS, MethodConfig, SvdLlm
from vllm_svd.errors import SvdError


class RecipeError(SvdError):
    """A recipe, from a file or from flags, that asks for what does not exist."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{where} is not a valid recipe:{listed}")


def _method_name(method: Any) -> Any:
    return method.get("name") if isinstance(method, dict) else method


class Weights(BaseModel):
    """`kept` is the fraction of the bytes of all matrices that stays; 1.0 leaves them dense.

    `method` and `allocator` are names, or mappings of `name` and their own options.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: MethodConfig = SvdLlm()
    kept: Kept = 0.8
    allocator: AllocatorConfig = Uniform()
    rank_multiple: PositiveInt = 1

    @model_validator(mode="before")
    @classmethod
    def _allocator_of_the_method(cls, raw: Any) -> Any:
        """A method that was published with an allocator has it unless another one is given."""
        if isinstance(raw, dict) and raw.get("allocator") is None:
            name = _method_name(raw.get("method")) or "svd_llm"
            method = METHODS.get(name) if isinstance(name, str) else None
            return {**raw, "allocator": method.allocator if method else "uniform"}
        return raw

    @field_validator("method", "allocator", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Calibration(BaseModel):
    """`samples` windows of `context` tokens from `text`; `batch` of them run at a time.

    Hidden states of more than `host_memory_gib` live in a mapped file of the work directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    samples: PositiveInt = 64
    context: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch: PositiveInt = 4
    host_memory_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0


class Evaluation(BaseModel):
    """`samples` windows at the end of the text are held out, and errors are measured on them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: PositiveInt = 16


class CompressionRecipe(BaseModel):
    """Every field has a default except the text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Weights = Weights()
    kv: KVBudget = KVBudget()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()

    def yaml(self) -> str:
        """The whole recipe, defaults included, as recipe.yaml holds it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def without_directories(self) -> "CompressionRecipe":
        """The same recipe with bare names of its text and of a local base: fit to be published."""
        text = self.calibration.text and Path(self.calibration.text).name
        calibration = self.calibration.model_copy(update={"text": text})
        weights, base = self.weights, self.weights.method.base_model
        if base is not None and Path(base).expanduser().is_dir():
            named = weights.method.model_copy(
                update={"base": Path(base).expanduser().resolve().name}
            )
            weights = weights.model_copy(update={"method": named})
        return self.model_copy(update={"weights": weights, "calibration": calibration})


_SECTIONS: dict[str, type[BaseModel]] = {
    "weights": Weights,
    "kv": KVBudget,
    "calibration": Calibration,
    "evaluation": Evaluation,
}
_UNIONS: dict[str, Mapping[str, type[BaseModel]]] = {"method": METHODS, "allocator": ALLOCATORS}

# The recipe field that each flag of the command line sets.
FLAGS = {
    "--method": "weights.method",
    "--allocator": "weights.allocator",
    "--kept": "weights.kept",
    "--kv-only": "weights.kept",
    "--kv-kept": "kv.kept",
    "--kv-mode": "kv.mode",
    "--kv-group": "kv.group",
    "--kv-store": "kv.store",
    "--kv-allocator": "kv.allocator",
    "--text": "calibration.text",
    "--samples": "calibration.samples",
    "--seed": "calibration.seed",
    "--device": "calibration.device",
}


def load(path: Path | None = None, flags: Mapping[str, Any] | None = None) -> CompressionRecipe:
    """The recipe of a YAML file, or the default one, with the flags that were given set over it.

    Raises RecipeError that lists every problem by its YAML path and, where one set it, its flag.
    """
    recipe, error = load_valid(path, flags)
    if error is not None:
        raise error
    return recipe


def parse(raw: dict[str, Any], where: str) -> CompressionRecipe:
    """A recipe that is not in a file; raises RecipeError with every problem."""
    try:
        return CompressionRecipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(where, [_problem(dict(item), {}) for item in error.errors()]) from None


def load_valid(
    path: Path | None = None, flags: Mapping[str, Any] | None = None
) -> tuple[CompressionRecipe, RecipeError | None]:
    """What is valid of the recipe that `load` reads, and what `load` raises for the rest.

    The valid part lets the rest of a command's input be checked in the same go.
    """
    given = {flag: value for flag, value in (flags or {}).items() if value is not None}
    try:
        raw = _read(path) if path else {}
    except RecipeError as error:
        return CompressionRecipe(), error
    problems = []
    if "--kv-only" in given and given.get("--kept", 1) != 1:
        problems.append(
            f"weights.kept (--kept): {given['--kept']} was given beside --kv-only, which leaves "
            "the weights as they are; drop one of the two"
        )
    for flag, value in given.items():
        section, field = FLAGS[flag].split(".")
        fields = raw.setdefault(section, {})
        if not isinstance(fields, dict):
            continue  # validation reports the section itself
        if field in _UNIONS and _method_name(fields.get(field)) == value:
            continue  # the same method keeps the options that the file gives it
        fields[field] = value
    where = str(path) if path else "the command line"
    try:
        valid = CompressionRecipe.model_validate(raw)
        return valid, RecipeError(where, problems) if problems else None
    except ValidationError as error:
        problems += [_problem(dict(item), given) for item in error.errors()]
        for item in error.errors():
            _drop(raw, item["loc"])
        return CompressionRecipe.model_validate(raw), RecipeError(where, problems)


def _drop(raw: dict[str, Any], location: Sequence[Any]) -> None:
    """Remove the field that an error lies in, or its whole section; then it has its default."""
    section = raw.get(location[0])
    if len(location) > 1 and isinstance(section, dict):
        section.pop(location[1], None)
    else:
        raw.pop(location[0], None)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(str(path), [f"it cannot be read: {error.strerror}"]) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(str(path), [f"it is not YAML: {error}"]) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(
            str(path), [f"it holds a {type(raw).__name__}, not the sections {_names()}"]
        )
    # A section left empty in YAML is null; it means its defaults.
    return {name: {} if section is None else section for name, section in raw.items()}


def _names(model: type[BaseModel] = CompressionRecipe) -> str:
    return ", ".join(model.model_fields)


def _problem(item: dict[str, Any], given: Mapping[str, Any]) -> str:
    """One line: where (and the flag that set it), what was given, what is accepted."""
    location = [str(part) for part in item["loc"]]
    # pydantic puts the union's tag into the path: weights.method.asvd.alpha
    tagged = len(location) > 3 and location[0] == "weights" and location[1] in _UNIONS
    path = ".".join(location[:2] + location[3:] if tagged else location)
    if item["type"] == "union_tag_invalid":
        given_name = item["input"].get("name") if isinstance(item["input"], dict) else item["input"]
        accepted = ", ".join(_UNIONS[location[1]])
        return f"{_where(path, given)}: {given_name!r} was given; accepted are {accepted}"
    where = _where(path, given)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown; accepted here are {_names(_model_at(location[:-1]))}"
    return f"{where}: {item['input']!r} was given; {_decapitalised(item['msg'])}"


def _where(path: str, given: Mapping[str, Any]) -> str:
    """The YAML path, and the flag where one set it."""
    flag = next((flag for flag in given if FLAGS[flag] == path), None)
    return f"{path} ({flag})" if flag else path


def _model_at(location: Sequence[str]) -> type[BaseModel]:
    """The config model that a YAML path, with pydantic's union tag in it, leads to."""
    match location:
        case ["weights", ("method" | "allocator") as union, tag]:
            return _UNIONS[union][tag]
        case ["kv", "layers", _]:
            return LayerOverride
        case [section]:
            return _SECTIONS[section]
        case _:
            return CompressionRecipe


def _decapitalised(message: str) -> str:
    return message[:1].lower() + message[1:]
