"""Load a dense or compressed checkpoint directory as a transformers model."""

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from offline_compress.factors import DeltaFactors
from offline_compress.families import (
    Family,
    family_of,
    fill_computed,
    head_dim,
    layer_paths,
    respect_soft_caps,
    unfuse,
)
from offline_compress.kv.projection import KVBases
from offline_compress.reference.compressed_linear import CompressedLinear, install_skeleton
from offline_compress.reference.latent_kv import install_kv
from offline_compress.weights import (
    TORCH_DTYPES,
    Headers,
    Quantised,
    Source,
    SourceError,
    meta_model,
    model_config,
    open_base,
    open_source,
    quantised_layers,
    stored_dtype,
)
from vllm_svd.errors import CheckpointFormatError, SvdError
from vllm_svd.format import QUANT_METHOD, Manifest, SvdCheckpointConfig, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import read_manifest


def load(
    directory: Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> PreTrainedModel:
    """The model in `directory`, in evaluation mode on `device`, in `dtype` or the config's own.

    RoPE frequencies stay in fp32 whatever `dtype` is; `.to(dtype)` on the result would round them.
    Deltas are added to the weights of `base`, or of the model that the checkpoint names. Weights
    that another method quantised become the dense ones that they stand for.
    Raises CheckpointFormatError if a compressed checkpoint is damaged or incomplete, and SvdError
    if another one is.
    """
    directory = Path(directory)
    method = _quant_method(directory)
    if method is None:
        return _load_dense(directory, dtype).to(device).eval()
    if method != QUANT_METHOD:
        return _load_quantised(directory, dtype).to(device).eval()
    return _load_compressed(directory, verify(directory), dtype, base).to(device).eval()


def describe(directory: Path) -> tuple[PretrainedConfig, torch.dtype]:
    """The config of a dense or compressed model and the dtype it is stored in.

    Checks everything but the contents of the shards; raises what `load` raises.
    """
    if not directory.is_dir():
        raise SourceError(
            f"{directory}: no such directory\nRemedy: give a dense or compressed checkpoint"
        )
    if _quant_method(directory) != QUANT_METHOD:
        source = open_source(str(directory), quantised=True)
        return source.config, source.torch_dtype
    model = check(directory, verify(directory, contents=False))
    return model.config, model.dtype


def check(
    directory: Path, config: SvdCheckpointConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The compressed model on the meta device, in `dtype` or the one it is stored in.

    Raises CheckpointFormatError with everything in which config.json and the manifest differ from
    the model.
    """
    try:
        of_model = model_config(directory)
        if getattr(of_model, "quantization_config", None) is not None:
            del of_model.quantization_config  # transformers has no quantiser of that name
        family = family_of(of_model)
        dense = cast(PreTrainedModel, meta_model(directory, of_model))
    except SourceError as error:
        raise CheckpointFormatError(
            str(directory), [str(error).partition("\n")[0]], "restore config.json as it was written"
        ) from None
    manifest = read_manifest(directory)
    problems = _misfits(dense, family, config)
    if not problems:
        stored = of_model.dtype or TORCH_DTYPES[stored_dtype(_headers(manifest))]
        model = _skeleton(dense, family, config, dtype or stored)
        try:
            problems = _differences(model, _dense_headers(model, config, manifest))
        except SourceError as error:
            problems = [str(error).partition("\n")[0]]
    if problems:
        raise CheckpointFormatError(
            str(directory), problems, "compress the model again; config.json names another shape"
        )
    return model


def _quant_method(directory: Path) -> str | None:
    """Who compressed or quantised the model in `directory`; None where it is dense."""
    quantization = read_json(directory / "config.json").get("quantization_config")
    if quantization is None:
        return None
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else QUANT_METHOD


def _load_quantised(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    source = open_source(str(directory), quantised=True)
    model = cast(PreTrainedModel, meta_model(directory, source.config))
    model.to(dtype or source.torch_dtype)
    return _filled(model, {name: source.read(name).to(model.dtype) for name in source.shapes})


def _filled(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model on the meta device with its tensors, as they are."""
    fill_computed(model)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model


def _load_dense(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        model: PreTrainedModel
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SvdError(
            f"{directory} cannot be loaded: {error}\n"
            "Remedy: give a complete Hugging Face directory with safetensors weights"
        ) from None
    # transformers only warns, and fills what is missing with random numbers
    problems = [f"{name} is missing" for name in sorted(loading["missing_keys"])]
    problems += [f"{name} is not part of this model" for name in sorted(loading["unexpected_keys"])]
    if problems:
        raise SvdError(
            f"{directory} does not match its config.json: {'; '.join(problems)}\n"
            "Remedy: copy the dense checkpoint again"
        )
    unfuse(model, family_of(model.config))
    respect_soft_caps(model)
    return model


def _load_compressed(
    directory: Path,
    config: SvdCheckpointConfig,
    dtype: torch.dtype | None,
    base: str | Path | None,
) -> PreTrainedModel:
    model = check(directory, config, dtype)
    manifest = read_manifest(directory)
    as_stored = {name for name, stored in config.tensors().items() if stored.dtype}
    quantised = _quantised(model, config, manifest)
    if quantised is not None:
        as_stored.update(part for path in quantised.shapes for part in quantised.parts(path))
    state = {
        name: tensor if name in as_stored else tensor.to(model.dtype)
        for shard in manifest.shards
        for name, tensor in load_file(directory / shard).items()
    }
    if quantised is not None:
        for path in quantised.shapes:
            weight = quantised.dense(path, state.__getitem__).to(model.dtype)
            for part in quantised.parts(path):
                del state[part]
            state[f"{path}.weight"] = weight
    _filled(model, state)
    if config.deltas:
        _add_deltas(model, config, open_base(config, base))
    return model


def _add_deltas(model: PreTrainedModel, config: SvdCheckpointConfig, base: Source) -> None:
    """Make each delta an ordinary linear layer on the weight of the base."""
    for path in config.deltas:
        layer = cast(CompressedLinear, model.get_submodule(path))
        factors = cast(DeltaFactors, layer.factors()).on(base.read(f"{path}.weight"))
        module = config.modules[path]
        with torch.device("meta"):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
        weight = factors.dense().to(model.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        linear._forward_hooks.update(layer._forward_hooks)  # those of K/V projections
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)


def _misfits(dense: PreTrainedModel, family: Family, config: SvdCheckpointConfig) -> list[str]:
    """Modules that config.json compresses and the model does not have, or not in that shape."""
    modules = dict(dense.named_modules())
    attentions = {f"{layer}.{family.attention}" for layer in layer_paths(dense.config)}
    heads = [dense.config.num_key_value_heads, head_dim(dense.config)]
    problems = []
    for path, module in config.modules.items():
        linear = modules.get(path)
        shape = [module.out_features, module.in_features]
        if not isinstance(linear, nn.Linear):
            problems.append(f"{path}: compressed in config.json, no linear layer of the model")
        elif list(linear.weight.shape) != shape:
            found = list(linear.weight.shape)
            problems.append(f"{path}: factors of a {shape} matrix, the model has {found}")
    for path, projection in config.kv.items():
        given = [projection.num_kv_heads, projection.head_dim]
        if path not in attentions:
            problems.append(f"{path}: projected in config.json, no attention layer of the model")
        elif given != heads:
            problems.append(
                f"{path}: bases for {given[0]} KV heads of size {given[1]}, the model has "
                f"{heads[0]} of size {heads[1]}"
            )
    return problems


def _skeleton(
    dense: PreTrainedModel, family: Family, config: SvdCheckpointConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The compressed model with every parameter on the meta device."""
    model = dense.to(dtype)
    for path, module in config.modules.items():
        install_skeleton(model, path, module, dtype)
    with torch.device("meta"):
        for path, projection in config.kv.items():
            bases = (torch.empty(stored.shape) for stored in projection.tensors(path).values())
            layer = model.get_submodule(path.removesuffix(f".{family.attention}"))
            install_kv(layer, family, path, KVBases(projection, *bases))
    return model


def _quantised(
    model: PreTrainedModel, config: SvdCheckpointConfig, manifest: Manifest
) -> Quantised | None:
    """The layers that another method quantised, where one did; raises SourceError."""
    if config.weights is None:
        return None
    linears = family_of(model.config).linear_paths(model.config)
    shapes = {path: tuple(model.get_submodule(path).weight.shape) for path in linears}
    return quantised_layers(config.weights, shapes, _headers(manifest), model.state_dict())


def _dense_headers(
    model: PreTrainedModel, config: SvdCheckpointConfig, manifest: Manifest
) -> Headers:
    quantised = _quantised(model, config, manifest)
    return _headers(manifest) if quantised is None else quantised.dense_headers("F32")


def _headers(manifest: Manifest) -> Headers:
    return {name: (record.dtype, record.shape) for name, record in manifest.tensors.items()}


def _differences(model: PreTrainedModel, headers: Headers) -> list[str]:
    """Names and shapes of the stored tensors against the model's."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(shape) for name, (_, shape) in headers.items()}
    return [
        *(f"{name}: missing" for name in sorted(expected.keys() - found.keys() - tied)),
        *(f"{name}: not part of this model" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name}: shape {found[name]}, the model has {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ),
    ]
