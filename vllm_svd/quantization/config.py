"""vLLM's quantization config for `quant_method: svd`: which method serves which layer."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_svd.compat import (
    Attention,
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    get_quantization_config,
    get_tensor_model_parallel_world_size,
    init_logger,
)
from vllm_svd.errors import SvdError, UnsupportedModelError
from vllm_svd.format import QUANT_METHOD, Module, SvdCheckpointConfig, parse, verify
from vllm_svd.quantization.completeness import CheckedEmbeddingMethod, CheckedLinearMethod
from vllm_svd.quantization.latent_kv import LatentKVMethod
from vllm_svd.quantization.linear import ShardedLinearMethod
from vllm_svd.quantization.shards import MATRICES

logger = init_logger("vllm.svd")

VERIFY_VARIABLE = "VLLM_SVD_VERIFY"
VERIFY_DEPTHS = ("contents", "headers", "none")
EXPERTS = ".experts."
DRAFT_ROOT = "draft_model."  # of a model that drafts for another, under which vLLM builds it


# Fused layers of models that add them to their mapping only after vLLM has copied it, as Qwen3-MoE
# does for the MLPs of its dense layers.
_FUSED = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class SvdConfig(QuantizationConfig):
    """One per compressed model of an engine, made from config.json's `quantization_config`."""

    def __init__(self, checkpoint: SvdCheckpointConfig | None = None) -> None:
        super().__init__()
        if checkpoint is None:  # --quantization svd on a checkpoint without a config of ours
            raise UnsupportedModelError(
                "--quantization svd was given for a checkpoint that is not compressed",
                "directories that offline-compress wrote; vLLM recognises them by itself",
                "drop --quantization, or compress the model first",
            )
        _refuse_unserved(checkpoint.modules)
        self.modules = dict(checkpoint.modules)
        self.kv = dict(checkpoint.kv)
        # Whose method quantised the weights, where it was not ours.
        self.weights = _config_of(checkpoint.weights) if checkpoint.weights else None

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        if self.weights is not None:
            accepted: list[torch.dtype] = self.weights.get_supported_act_dtypes()
            return accepted
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SvdConfig":
        """Raises CheckpointFormatError that lists every problem of the config."""
        return cls(parse(config, "config.json: quantization_config"))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,
        revision: str | None = None,
    ) -> None:
        """Verify a local checkpoint before any tensor is read.

        VLLM_SVD_VERIFY=headers leaves out the SHA-256 of the shards (one read of the whole file),
        none leaves out everything. Raises CheckpointFormatError with every problem.
        """
        _verify(model_name)
        if self.weights is not None:
            self.weights.maybe_update_config(model_name, hf_config, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        self.kv = hf_to_vllm_mapper.apply_dict(self.kv)
        if self.weights is not None:
            self.weights.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._check_tensor_parallel()
        path = prefix.removeprefix(DRAFT_ROOT)
        if isinstance(layer, Attention):
            projection = self.kv.get(path.removesuffix(".attn"))
            if projection is not None:
                return LatentKVMethod(self, projection)
        if self.weights is not None:
            self.weights.packed_modules_mapping = self.packed_modules_mapping
            method: QuantizeMethodBase | None = self.weights.get_quant_method(layer, path)
            if method is not None and type(method) is not UnquantizedLinearMethod:
                return method
        return self._own_method(layer, path)

    def _own_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            parent, _, leaf = prefix.rpartition(".")
            names = self.packed_modules_mapping.get(leaf, _FUSED.get(leaf, [leaf]))
            shards = [self.modules.get(f"{parent}.{name}") for name in names]
            return ShardedLinearMethod(shards) if any(shards) else CheckedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            if prefix in self.modules:
                raise _unserved([f"{prefix} is an embedding or the language-model head"])
            return CheckedEmbeddingMethod()
        return None

    def _check_tensor_parallel(self) -> None:
        # vLLM's models only assert this, and only after the first layers are built.
        if not self.kv:
            return
        size = get_tensor_model_parallel_world_size()
        for path, projection in self.kv.items():
            heads = projection.num_kv_heads
            if heads % size and size % heads:
                raise UnsupportedModelError(
                    f"{path} has {heads} KV heads, which tensor parallel size {size} cannot share",
                    "sizes that divide the KV heads, or are a multiple of them",
                    f"start vLLM with another --tensor-parallel-size than {size}",
                )
            if max(1, heads // size) % projection.group:
                raise UnsupportedModelError(
                    f"{path}: {projection.group} of its {heads} KV heads share a latent, which "
                    f"tensor parallel size {size} would take apart",
                    f"sizes that divide {projection.groups}, the number of latents",
                    f"start vLLM with another --tensor-parallel-size than {size}, or compress the "
                    "model with a smaller kv.group",
                )


def _verify(model_name: str) -> None:
    """As far as VLLM_SVD_VERIFY says; a hub id is not verified."""
    depth = os.environ.get(VERIFY_VARIABLE, "contents")
    if depth not in VERIFY_DEPTHS:
        raise SvdError(
            f"{VERIFY_VARIABLE} is {depth!r}; accepted are {', '.join(VERIFY_DEPTHS)}\n"
            f"Remedy: unset {VERIFY_VARIABLE}"
        )
    directory = Path(model_name)
    if depth == "none" or not directory.is_dir():
        logger.warning("%s is not verified before loading.", model_name)
        return
    verify(directory, contents=depth == "contents")
    logger.info("Verified the %s of %s.", depth, directory)


def _config_of(weights: dict[str, Any]) -> QuantizationConfig:
    """vLLM's own config of the method that quantised the weights; raises UnsupportedModelError."""
    method = weights["quant_method"]
    try:
        return get_quantization_config(method).from_config(weights)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"the weights are quantised by {method}, which this vLLM does not serve: {error}",
            "what vLLM serves without K/V projections",
            "serve the model that was quantised with a vLLM that serves it, or project another",
        ) from None


def _refuse_unserved(modules: Mapping[str, Module]) -> None:
    """Raises UnsupportedModelError that names every kind of module vLLM has no method for."""
    problems = []
    kinds = Counter(module.kind for module in modules.values())
    for kind in sorted(kinds.keys() - MATRICES.keys()):
        problems.append(f"{kinds[kind]} modules are of kind {kind!r}")
    # vLLM computes all experts of a layer in one kernel, which takes dense weights.
    experts = sorted(path for path in modules if EXPERTS in path)
    if experts:
        problems.append(f"{len(experts)} modules are experts of a mixture, {experts[0]} the first")
    if problems:
        raise _unserved(problems)


def _unserved(problems: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"vLLM cannot serve this checkpoint compressed: {'; '.join(problems)}",
        f"linear layers of kinds {', '.join(MATRICES)} outside the experts of a mixture",
        "write a dense checkpoint with offline-compress restore, and serve that",
    )
