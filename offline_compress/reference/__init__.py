"""The compressed model in plain transformers: what the server must compute."""

from offline_compress.reference.latent_kv import LatentKV, install_kv
from offline_compress.reference.load import check, describe, load
from offline_compress.reference.low_rank import LowRankLinear, install_factors

__all__ = [
    "LatentKV",
    "LowRankLinear",
    "check",
    "describe",
    "install_factors",
    "install_kv",
    "load",
]
