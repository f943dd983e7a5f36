"""K/V channel projections of one attention layer."""

from dataclasses import dataclass, fields

import torch

from vllm_svd.format import KVProjection


@dataclass(frozen=True)
class KVBases:
    """Bases per KV head: k_down [heads, k_rank, d], k_up [heads, d, k_rank], the same for v.

    Cached are `k_down @ k` and `v_down @ v`; `k_up`, `v_up` rebuild key and attention output.
    """

    config: KVProjection
    k_down: torch.Tensor
    k_up: torch.Tensor
    v_down: torch.Tensor
    v_up: torch.Tensor

    def to(self, dtype: torch.dtype) -> "KVBases":
        """The bases as they will be stored."""
        return KVBases(self.config, *(tensor.to(dtype) for tensor in self._bases().values()))

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of the attention layer at `path`."""
        return {f"{path}.attn.{name}": basis.contiguous() for name, basis in self._bases().items()}

    def _bases(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}
