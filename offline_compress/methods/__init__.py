"""Weight compression methods. A new one is a file here and a name in `MethodConfig`."""

from typing import Annotated

from pydantic import Field

from offline_compress.methods.asvd import Asvd
from offline_compress.methods.factors import LowRankFactors
from offline_compress.methods.method import Factorization, Method, workspace_bytes
from offline_compress.methods.svd import Svd
from offline_compress.methods.svd_llm import SvdLlm

MethodConfig = Annotated[Svd | Asvd | SvdLlm, Field(discriminator="name")]

__all__ = [
    "Asvd",
    "Factorization",
    "LowRankFactors",
    "Method",
    "MethodConfig",
    "Svd",
    "SvdLlm",
    "workspace_bytes",
]
