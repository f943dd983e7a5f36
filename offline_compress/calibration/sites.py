"""Which linear layers read the same input, and which Grams are held at the same time."""

from collections.abc import Iterable, Mapping

from transformers import PretrainedConfig

from offline_compress.families import Family

# Bytes of Grams held at once; a model with more of them is run over the text once per group.
GRAM_BUDGET = 8 << 30

_SHARES_INPUT_OF = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


def sites(family: Family, config: PretrainedConfig) -> dict[str, str]:
    """For each compressible linear layer the path of the one at which its input is observed.

    A decoder layer has four such sites for its seven linear layers.
    """
    observed = {}
    for path in family.linear_paths(config):
        for reader, first in _SHARES_INPUT_OF.items():
            if path.endswith(f".{reader}"):
                observed[path] = f"{path.removesuffix(reader)}{first}"
                break
        else:
            observed[path] = path
    return observed


def gram_bytes(widths: Iterable[int]) -> int:
    """Bytes of fp64 Grams [n, n]."""
    return sum(8 * width * width for width in widths)


def groups(widths: Mapping[str, int], budget: int = GRAM_BUDGET) -> list[dict[str, int]]:
    """Sites (path: width n) in order, cut so that the Grams of each group fit the budget, in bytes.

    A Gram that exceeds the budget alone is a group of its own.
    """
    made: list[dict[str, int]] = []
    for path, width in widths.items():
        if not made or gram_bytes([*made[-1].values(), width]) > budget:
            made.append({})
        made[-1][path] = width
    return made
