"""Text, and what it says about the inputs of every linear layer."""

from offline_compress.calibration.collect import ActivationError, collect
from offline_compress.calibration.measure import output_errors
from offline_compress.calibration.sites import GRAM_BUDGET, gram_bytes, groups, sites
from offline_compress.calibration.statistics import LayerStatistics, Needs
from offline_compress.calibration.text import Corpus, TextError, split

__all__ = [
    "GRAM_BUDGET",
    "ActivationError",
    "Corpus",
    "LayerStatistics",
    "Needs",
    "TextError",
    "collect",
    "gram_bytes",
    "groups",
    "output_errors",
    "sites",
    "split",
]
