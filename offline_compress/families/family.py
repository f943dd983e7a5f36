"""A model family is data: where its linear layers are and where its key is complete before RoPE."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from vllm_svd.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Paths are relative to a decoder layer, `model.layers.<i>`.

    `query_output` and `key_output` name the modules whose outputs are the query and the key
    that RoPE receives: the projection itself, or the norm that follows it.
    """

    name: str
    architectures: tuple[str, ...]
    query_output: str = "self_attn.q_proj"
    key_output: str = "self_attn.k_proj"
    value_output: str = "self_attn.v_proj"
    attention: str = "self_attn"
    linears: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )

    def linear_paths(self, config: PretrainedConfig) -> Iterator[str]:
        """Paths of every compressible linear layer, in execution order."""
        for layer in layer_paths(config):
            for linear in self.linears:
                yield f"{layer}.{linear}"


FAMILIES = (
    Family("llama", ("LlamaForCausalLM", "MistralForCausalLM")),
    Family("qwen2", ("Qwen2ForCausalLM",)),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        query_output="self_attn.q_norm",
        key_output="self_attn.k_norm",
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
