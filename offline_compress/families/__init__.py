"""Supported model families."""

from offline_compress.families.experts import Expert, Experts, unfuse
from offline_compress.families.family import FAMILIES, Family, family_of, head_dim, layer_paths

__all__ = [
    "FAMILIES",
    "Expert",
    "Experts",
    "Family",
    "family_of",
    "head_dim",
    "layer_paths",
    "unfuse",
]
