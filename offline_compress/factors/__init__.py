"""What methods return for one weight, one file an artefact."""

from collections.abc import Mapping

import torch

from offline_compress.factors.codebook import CodebookFactors
from offline_compress.factors.delta import DeltaFactors
from offline_compress.factors.factors import Factors
from offline_compress.factors.low_rank import LowRankFactors
from offline_compress.factors.low_rank_int8 import LowRankInt8Factors
from offline_compress.factors.reduced import ReducedFactors
from vllm_svd.format import Module

ARTEFACTS: dict[str, type[Factors]] = {
    "low_rank": LowRankFactors,
    "low_rank_int8": LowRankInt8Factors,
    "codebook": CodebookFactors,
    "reduced": ReducedFactors,
    "delta": DeltaFactors,
}


def of_parts(config: Module, parts: Mapping[str, torch.Tensor]) -> Factors:
    """The artefact that `config` describes, of its stored parts by suffix."""
    found = ARTEFACTS[config.kind].of_parts(config, parts)
    return found.rebuilt(found.parts(), parts.get("correction"))


__all__ = [
    "ARTEFACTS",
    "CodebookFactors",
    "DeltaFactors",
    "Factors",
    "LowRankFactors",
    "LowRankInt8Factors",
    "ReducedFactors",
    "of_parts",
]
