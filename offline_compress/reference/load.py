"""Load a dense or compressed checkpoint directory as a transformers model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from offline_compress.families import family_of
from offline_compress.kv.projection import KVBases
from offline_compress.methods.factors import LowRankFactors
from offline_compress.reference.latent_kv import install_kv
from offline_compress.reference.low_rank import install_factors
from vllm_svd.errors import CheckpointFormatError, SvdError
from vllm_svd.format import QUANT_METHOD, SvdCheckpointConfig, verify
from vllm_svd.format.config import read_json
from vllm_svd.format.manifest import read_manifest


def load(
    directory: Path, device: torch.device | str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in `directory`, in evaluation mode on `device`, in `dtype` or the config's own.

    Raises CheckpointFormatError if a compressed checkpoint is damaged or incomplete, and SvdError
    if a dense one is, or if another quantisation method wrote it.
    """
    directory = Path(directory)
    quantization = read_json(directory / "config.json").get("quantization_config")
    if quantization is None:
        return _load_dense(directory, dtype).to(device).eval()
    if quantization.get("quant_method") != QUANT_METHOD:
        raise SvdError(
            f"{directory} is quantised with {quantization.get('quant_method')!r}; accepted are "
            f"dense checkpoints and {QUANT_METHOD!r}\nRemedy: start from the dense checkpoint"
        )
    return _load_compressed(directory, verify(directory), dtype).to(device).eval()


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
    except OSError as error:
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
    return model


def _load_compressed(
    directory: Path, config: SvdCheckpointConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    model_config = AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    del model_config.quantization_config  # transformers has no quantiser of that name
    dtype = dtype or model_config.dtype or torch.get_default_dtype()
    model = _skeleton(model_config, config, dtype)
    state = {
        name: tensor.to(dtype)
        for shard in read_manifest(directory).shards
        for name, tensor in load_file(directory / shard).items()
    }
    tied = model.all_tied_weights_keys if model_config.tie_word_embeddings else {}
    if problems := _differences(model, state, set(tied)):
        raise CheckpointFormatError(
            str(directory), problems, "compress the model again; config.json names another shape"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model


def _skeleton(
    model_config: PretrainedConfig, config: SvdCheckpointConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The compressed model with every parameter on the meta device."""
    family = family_of(model_config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=False
        )
        for path, module in config.modules.items():
            factors = (torch.empty(shape) for shape in module.tensors(path).values())
            install_factors(model, path, LowRankFactors(*factors))
        for path, projection in config.kv.items():
            bases = (torch.empty(shape) for shape in projection.tensors(path).values())
            install_kv(model, family, path, KVBases(projection, *bases))
    # RoPE frequencies are computed, never stored
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config=model_config)
    return model


def _differences(
    model: PreTrainedModel, state: dict[str, torch.Tensor], tied: set[str]
) -> list[str]:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    return [
        *(f"{name}: missing" for name in sorted(expected.keys() - found.keys() - tied)),
        *(f"{name}: not part of this model" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name}: shape {found[name]}, the model has {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ),
    ]
