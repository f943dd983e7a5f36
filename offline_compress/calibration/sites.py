"""Which linear layers read the same input: four Grams a decoder layer, not seven."""

from transformers import PretrainedConfig

from offline_compress.families import Family

_SHARES_INPUT_OF = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


def sites(family: Family, config: PretrainedConfig) -> dict[str, str]:
    """For each compressible linear layer the path of the one at which its input is observed."""
    observed = {}
    for path in family.linear_paths(config):
        for reader, first in _SHARES_INPUT_OF.items():
            if path.endswith(f".{reader}"):
                observed[path] = f"{path.removesuffix(reader)}{first}"
                break
        else:
            observed[path] = path
    return observed
