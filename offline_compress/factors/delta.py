"""A sparse factored difference of a fine-tuned weight from its base."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from offline_compress.factors.factors import Factors
from vllm_svd.errors import CheckpointFormatError
from vllm_svd.format.delta import Delta

_WORD = 0xFFFFFFFF
_AT_ONCE = 64  # columns whose keys, of 8 bytes, are in memory together


@dataclass(frozen=True)
class DeltaFactors(Factors):
    """W [m, n] = base + U V^T, packed as vllm_svd.format.delta.Delta stores it.

    The base [m, n] is never stored: `of_parts` leaves it out and `on` attaches it.
    """

    module: Delta
    packed: Mapping[str, torch.Tensor]
    base: torch.Tensor | None = None

    @classmethod
    def pack(
        cls,
        module: Delta,
        factors: Mapping[str, torch.Tensor],
        counts: Mapping[str, torch.Tensor],
    ) -> Self:
        """Keep `counts` [r] entries of each column of U^T [r, m] and V^T [r, n], by name.

        Which ones is chosen by the module's seed. With 8 or 4 bits they are rounded to nearest,
        the step of a column its largest entry over the largest integer.
        """
        packed, scale = {}, torch.ones(module.rank, dtype=torch.float64)
        for name, rows in factors.items():
            mask = chosen(counts[name], rows.shape[1], module.seed, name)
            if module.bits == 16:
                packed[name] = rows[mask]
            else:
                steps, step = _rounded(torch.where(mask, rows, 0.0), module.bits)
                packed[name] = steps[mask] if module.bits == 8 else _nibbles(steps[mask])
                scale = scale.to(step) * step
            if module.masks == "bitmap":
                packed[f"{name}_bitmap"] = _bitmap(mask)
            else:
                packed[f"{name}_count"] = counts[name].int()
        if module.bits != 16:
            packed["scale"] = scale.float()
        return cls(module, packed)

    def on(self, base: torch.Tensor | None) -> Self:
        """The same delta on a base [m, n]."""
        return replace(self, base=base)

    def factor(self, name: str) -> torch.Tensor:
        """U^T [r, m] or V^T [r, n], in fp64, without the scale.

        Raises CheckpointFormatError where masks and config disagree.
        """
        length, kept = self.module.factors()[name]
        values, mask = self.packed[name], self._mask(name)
        rows = torch.zeros(self.module.rank, length, dtype=torch.float64, device=values.device)
        if self.module.bits == 4:
            values = torch.stack([values & 0xF, values >> 4], 1).flatten()[:kept].char()
            values = torch.where(values > 7, values - 16, values)
        rows[mask] = values.double()
        return rows

    def delta(self) -> torch.Tensor:
        """U V^T [m, n], in fp64."""
        left = self.factor("U")
        if self.module.bits != 16:
            left = left * self.packed["scale"].double()[:, None]
        return left.T @ self.factor("V")

    def dense(self) -> torch.Tensor:
        if self.base is None:
            raise LookupError("a delta has no dense weight before `on` gives it its base")
        return self.base.double() + self.delta()

    def config(self) -> Delta:
        return self.module.model_copy(update={"correction": self.correction is not None})

    def parts(self) -> dict[str, torch.Tensor]:
        return dict(self.packed)

    @classmethod
    def of_parts(cls, config: Delta, parts: Mapping[str, torch.Tensor]) -> Self:
        return cls(config, {name: parts[name] for name in config.parts()})

    def rebuilt(self, parts: Mapping[str, torch.Tensor], correction: torch.Tensor | None) -> Self:
        return super().rebuilt(parts, correction).on(self.base)

    def _mask(self, name: str) -> torch.Tensor:
        """Where the entries of a factor stand, [r, length]."""
        rank, (length, kept) = self.module.rank, self.module.factors()[name]
        if self.module.masks == "bitmap":
            mask = _bits(self.packed[f"{name}_bitmap"])[: rank * length].view(rank, length)
        else:
            mask = chosen(self.packed[f"{name}_count"], length, self.module.seed, name)
        if (found := int(mask.sum())) != kept:
            raise CheckpointFormatError(
                f"the delta of a weight [{self.module.out_features}, {self.module.in_features}]",
                [f"{name}: its masks have {found} entries, config.json says {kept}"],
                "copy the checkpoint again, or compress the model again",
            )
        return mask


def chosen(counts: torch.Tensor, length: int, seed: int, name: str) -> torch.Tensor:
    """Mask [r, length] of the entries that each column of a factor keeps: its smallest keys."""
    rows = _mix(torch.arange(length, device=counts.device))
    start = _mix(torch.tensor((seed + "UV".index(name)) & _WORD, device=counts.device))
    columns = _mix(start ^ torch.arange(len(counts), device=counts.device))
    last = (counts.long() - 1).clamp(0, length - 1)
    masks = []
    for some, place in zip(
        torch.split(columns, _AT_ONCE), torch.split(last, _AT_ONCE), strict=True
    ):
        keys = _mix(some[:, None] ^ rows)
        masks.append(keys <= keys.sort(1).values.gather(1, place[:, None]))
    return torch.cat(masks) & (counts > 0)[:, None]


def _mix(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, held in int64; the factors are signed, so nothing overflows."""
    words = words ^ words >> 16
    words = (words * 0x7FEB352D) & _WORD
    words = words ^ words >> 15
    words = (words * (0x846CA68B - (1 << 32))) & _WORD
    return words ^ words >> 16


def _rounded(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [r, k] and fp64 steps [r] of rows [r, k]; a row of zeros has step 0."""
    largest = (1 << bits - 1) - 1
    step = rows.abs().amax(1) / largest
    unit = torch.where(step > 0, step, torch.ones_like(step))
    return (rows / unit[:, None]).round().clamp(-largest, largest).to(torch.int8), step


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """Two's complement of 4 bits, two a byte."""
    words = values.view(torch.uint8) & 0xF
    low, high = torch.nn.functional.pad(words, (0, len(words) % 2)).view(-1, 2).unbind(1)
    return low | high << 4


def _bitmap(mask: torch.Tensor) -> torch.Tensor:
    """One bit an entry, the first the lowest of its byte."""
    bits = torch.nn.functional.pad(mask.flatten().byte(), (0, -mask.numel() % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << places).sum(1).to(torch.uint8)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> places) & 1).bool().flatten()
