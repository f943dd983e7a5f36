"""Supported model families."""

from offline_compress.families.experts import Expert, Experts, unfuse
from offline_compress.families.family import FAMILIES, Family, family_of, head_dim, layer_paths
from offline_compress.families.model import fill_computed, respect_soft_caps, soft_capped

__all__ = [
    "FAMILIES",
    "Expert",
    "Experts",
    "Family",
    "family_of",
    "fill_computed",
    "head_dim",
    "layer_paths",
    "respect_soft_caps",
    "soft_capped",
    "unfuse",
]
