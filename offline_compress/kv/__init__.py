"""K/V channel projections: statistics, optimal bases and their error."""

from offline_compress.kv.collect import collect
from offline_compress.kv.projection import KVBases, kv_error, project
from offline_compress.kv.statistics import KVStatistics, Mode

__all__ = ["KVBases", "KVStatistics", "Mode", "collect", "kv_error", "project"]
