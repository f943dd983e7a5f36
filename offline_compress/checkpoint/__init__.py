"""The compressed checkpoint directory: written, inspected, and turned dense again."""

from offline_compress.checkpoint.inspect import Inspection, inspect, read_plan
from offline_compress.checkpoint.measurements import CacheError, MatrixError, Measurements
from offline_compress.checkpoint.merge import merge
from offline_compress.checkpoint.restore import Dropped, restore
from offline_compress.checkpoint.writer import bytes_needed, write
from offline_compress.staging import OutputError, ensure_room, ensure_vacant

__all__ = [
    "CacheError",
    "Dropped",
    "Inspection",
    "MatrixError",
    "Measurements",
    "OutputError",
    "bytes_needed",
    "ensure_room",
    "ensure_vacant",
    "inspect",
    "merge",
    "read_plan",
    "restore",
    "write",
]
