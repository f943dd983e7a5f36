"""K/V channel projections: statistics, optimal bases and their error."""

from offline_compress.kv.collect import collect
from offline_compress.kv.projection import KVBases, kv_error, project
from offline_compress.kv.statistics import KVStatistics

__all__ = ["KVBases", "KVStatistics", "collect", "kv_error", "project"]
