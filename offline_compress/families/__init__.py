"""Supported model families."""

from offline_compress.families.family import FAMILIES, Family, family_of, head_dim, layer_paths

__all__ = ["FAMILIES", "Family", "family_of", "head_dim", "layer_paths"]
