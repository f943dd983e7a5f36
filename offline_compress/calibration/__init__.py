"""Text, and what it says about the inputs of every linear layer."""

from offline_compress.calibration.collect import (
    Streams,
    channel_energies,
    collect,
    held_out_errors,
)
from offline_compress.calibration.distributed import Workers, process_group
from offline_compress.calibration.hidden_states import HOST_LIMIT, HiddenStates, micro_batches
from offline_compress.calibration.moments import ActivationError
from offline_compress.calibration.network import (
    Network,
    WeightError,
    bias_of,
    finite_weight,
    weight_of,
)
from offline_compress.calibration.sites import stages
from offline_compress.calibration.statistics import (
    GRADIENTS,
    SHIFTED,
    LayerStatistics,
    Moment,
    Needs,
)
from offline_compress.calibration.text import Corpus, TextError, split

__all__ = [
    "GRADIENTS",
    "HOST_LIMIT",
    "SHIFTED",
    "ActivationError",
    "Corpus",
    "HiddenStates",
    "LayerStatistics",
    "Moment",
    "Needs",
    "Network",
    "Streams",
    "TextError",
    "WeightError",
    "Workers",
    "bias_of",
    "channel_energies",
    "collect",
    "finite_weight",
    "held_out_errors",
    "micro_batches",
    "process_group",
    "split",
    "stages",
    "weight_of",
]
