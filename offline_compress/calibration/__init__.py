"""Text, and what it says about the inputs of every linear layer."""

from offline_compress.calibration.collect import ActivationError, collect
from offline_compress.calibration.measure import output_errors
from offline_compress.calibration.sites import sites
from offline_compress.calibration.statistics import LayerStatistics
from offline_compress.calibration.text import Corpus, TextError, split

__all__ = [
    "ActivationError",
    "Corpus",
    "LayerStatistics",
    "TextError",
    "collect",
    "output_errors",
    "sites",
    "split",
]
