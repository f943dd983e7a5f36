"""The compressed model in plain transformers: what the server must compute."""

from offline_compress.reference.compressed_linear import CompressedLinear, install_factors
from offline_compress.reference.latent_kv import LatentKV, hold_exactly, install_kv, kv_installed
from offline_compress.reference.load import check, describe, load

__all__ = [
    "CompressedLinear",
    "LatentKV",
    "check",
    "describe",
    "hold_exactly",
    "install_factors",
    "install_kv",
    "kv_installed",
    "load",
]
