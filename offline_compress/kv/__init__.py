"""K/V channel projections: statistics, optimal bases and their error."""

from offline_compress.kv.collect import collect
from offline_compress.kv.projection import KVBases, channel_energies, kv_error, project
from offline_compress.kv.rotation import rotation
from offline_compress.kv.statistics import KVStatistics

__all__ = [
    "KVBases",
    "KVStatistics",
    "channel_energies",
    "collect",
    "kv_error",
    "project",
    "rotation",
]
