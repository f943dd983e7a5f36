"""A model family is data: where its linear layers are and where its key is complete before RoPE."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from vllm_svd.errors import UnsupportedModelError


def dense(_config: PretrainedConfig, _layer: int) -> int:
    """No layer has experts."""
    return 0


def qwen_moe(config: PretrainedConfig, layer: int) -> int:
    """Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step:
        return 0
    return int(config.num_experts)


@dataclass(frozen=True)
class Family:
    """Paths are relative to a decoder layer, `model.layers.<i>`.

    `query_output` and `key_output` name the modules whose outputs are the query and the key
    that RoPE receives: the projection itself, or the norm that follows it. `routed_experts` gives
    the number of experts of a layer; 0 is an ordinary MLP.
    """

    name: str
    architectures: tuple[str, ...]
    query_output: str = "self_attn.q_proj"
    key_output: str = "self_attn.k_proj"
    value_output: str = "self_attn.v_proj"
    attention: str = "self_attn"
    mlp: str = "mlp"
    routed_experts: Callable[[PretrainedConfig, int], int] = dense

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised between their projection and RoPE."""
        return not self.query_output.endswith("q_proj")

    def inputs(self, config: PretrainedConfig) -> Iterator[tuple[str, ...]]:
        """Paths of the compressible linear layers, in execution order, one tuple per input.

        Each expert reads tokens of its own. Its router stays dense.
        """
        for index, layer in enumerate(layer_paths(config)):
            attention, mlp = f"{layer}.{self.attention}", f"{layer}.{self.mlp}"
            yield tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
            yield (f"{attention}.o_proj",)
            experts = range(self.routed_experts(config, index))
            for path in [f"{mlp}.experts.{expert}" for expert in experts] or [mlp]:
                yield f"{path}.gate_proj", f"{path}.up_proj"
                yield (f"{path}.down_proj",)

    def linear_paths(self, config: PretrainedConfig) -> Iterator[str]:
        """Paths of every compressible linear layer, in execution order."""
        for readers in self.inputs(config):
            yield from readers

    def input_sites(self, config: PretrainedConfig) -> dict[str, str]:
        """For each compressible linear layer the path of the one at which its input is observed."""
        return {path: readers[0] for readers in self.inputs(config) for path in readers}


FAMILIES = (
    Family("llama", ("LlamaForCausalLM", "MistralForCausalLM")),
    Family("gemma2", ("Gemma2ForCausalLM",)),
    Family("qwen2", ("Qwen2ForCausalLM",)),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        query_output="self_attn.q_norm",
        key_output="self_attn.k_norm",
    ),
    Family(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        query_output="self_attn.q_norm",
        key_output="self_attn.k_norm",
        routed_experts=qwen_moe,
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model; raises UnsupportedModelError that names the supported ones."""
    given = tuple(config.architectures or ())
    for family in FAMILIES:
        if set(given) & set(family.architectures):
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(
        f"architecture {', '.join(given) or '(none in config.json)'} is not supported",
        supported,
        "choose a model of a supported architecture",
    )


def layer_paths(config: PretrainedConfig) -> list[str]:
    """Paths of the decoder layers, in order."""
    return [f"model.layers.{index}" for index in range(config.num_hidden_layers)]


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
