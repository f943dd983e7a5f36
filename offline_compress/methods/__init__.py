"""Weight compression methods. A new one is a file here and a name in `MethodConfig`."""

from typing import Annotated, get_args

from pydantic import Field

from offline_compress.methods.asvd import Asvd
from offline_compress.methods.auto import Auto
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.dobi_svd import DobiSvd
from offline_compress.methods.fwsvd import Fwsvd
from offline_compress.methods.gfwsvd import Gfwsvd
from offline_compress.methods.gptvq import Gptvq
from offline_compress.methods.impart import Impart
from offline_compress.methods.method import (
    Compressed,
    Factorization,
    LowRankMethod,
    Method,
    OfferingMethod,
    Recovery,
    low_rank_at,
    rank_at,
    workspace_bytes,
)
from offline_compress.methods.modegpt import ModeGpt
from offline_compress.methods.svd import Svd
from offline_compress.methods.svd_llm import SvdLlm
from offline_compress.methods.svd_llm_v2 import SvdLlmV2

Methods = (
    Svd | Asvd | SvdLlm | SvdLlmV2 | Fwsvd | Gfwsvd | DobiSvd | ModeGpt | Gptvq | Impart | Auto
)
MethodConfig = Annotated[Methods, Field(discriminator="name")]

METHODS: dict[str, type[Method]] = {
    method.model_fields["name"].default: method for method in get_args(Methods)
}

__all__ = [
    "METHODS",
    "Asvd",
    "Auto",
    "Block",
    "Compressed",
    "DobiSvd",
    "Factorization",
    "Fwsvd",
    "Gfwsvd",
    "Gptvq",
    "Impart",
    "Layer",
    "LowRankMethod",
    "Method",
    "MethodConfig",
    "ModeGpt",
    "OfferingMethod",
    "Recovery",
    "Svd",
    "SvdLlm",
    "SvdLlmV2",
    "low_rank_at",
    "rank_at",
    "workspace_bytes",
]
