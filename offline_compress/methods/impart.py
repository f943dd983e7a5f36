"""ImPart: Yang et al., "ImPart: Importance-Aware Delta-Sparsification", ACL 2025, arXiv 2504.13237.

dW = W - base = U diag(s) V^T [m, n]; of its r leading triplets, entry i of column k of U and of V
is kept with probability 1 - p_k and divided by it, so that E[dW'] = dW where p_k < 1:
p_k = gamma (1 - (s_k / s_1)^C), and 1 from the tail upwards until their mean is gamma.

Every column keeps an exact number of entries. Masks are those of a counter-based integer hash
(vllm_svd.format.delta): neither device nor order matters, and a column's cost 4 bytes. Stored are
sqrt(s_k) U and sqrt(s_k) V. C = 0 is truncation; with a large C all but s_1 drop alike.
"""

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from offline_compress.calibration.statistics import Needs
from offline_compress.factors.delta import DeltaFactors
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.method import Compressed, Factorization, Method
from vllm_svd.errors import SvdError
from vllm_svd.format import Module
from vllm_svd.format.delta import Bits, Delta, Masks


class Impart(Method):
    """Stores a fine-tuned model as its difference from `base`, a directory or a hub id.

    `keep` is the fraction of a weight's dense bytes that its delta may take, with everything it
    needs, in place of the share of the plan. `preprune` is the fraction beta of the triplets that
    go first (fewer where all others fit), `exponent` is C. Masks that are stored cost bytes, but
    need no sorting when the delta is read.
    """

    paper: ClassVar[str] = "Yang et al., ACL 2025, arXiv 2504.13237"
    when: ClassVar[str] = "many fine-tuned models share one base: only their differences are kept"
    artefact: ClassVar[str] = "sparse packed factors of the difference from a base"

    name: Literal["impart"] = "impart"
    base: Annotated[str, Field(min_length=1)]
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    preprune: Annotated[float, Field(ge=0, lt=1)] = 0.6
    exponent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    bits: Bits = 16
    masks: Masks = "seeded"
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def needs(self) -> Needs:
        return frozenset()

    @property
    def base_model(self) -> str | None:
        return self.base

    def modules_at(
        self,
        layer: Layer,
        shares: Mapping[str, Fraction],
        multiple: int = 1,  # noqa: ARG002 - the delta is expanded before any kernel sees it
    ) -> dict[str, Module | str]:
        return {
            path: self.delta_at(
                *layer.shapes[path],
                share if self.keep is None else Fraction(str(self.keep)),
                layer.item_bytes,
                path,
            )
            for path, share in shares.items()
        }

    def delta_at(
        self, rows: int, columns: int, share: Fraction, item_bytes: int, path: str
    ) -> Delta | str:
        """The delta of W [m, n] that fills its share of the dense bytes, or why it stays dense."""
        if share >= 1:
            return "kept as it is"
        budget = int(share * rows * columns * item_bytes)
        smaller, both = min(rows, columns), rows + columns
        value_bits = 8 * item_bytes if self.bits == 16 else self.bits
        column_bits = 32 * (self.bits != 16) + (both if self.masks == "bitmap" else 64)
        begun = 8 * (self.bits == 4) + 16 * (self.masks == "bitmap")  # last bytes, not filled
        bits = 8 * budget - begun
        whole = bits // (both * value_bits + column_bits)
        rank = max(int((1 - Fraction(str(self.preprune))) * smaller), whole, 1)
        # Masks and scales take half of the budget at most: few bytes hold few columns.
        rank = min(rank, smaller, max(whole, bits // (2 * column_bits)))
        kept = min((bits - rank * column_bits) // value_bits, both * rank)
        kept_u, kept_v = kept * rows // both, kept * columns // both
        if rank < 1 or kept_u < 1 or kept_v < 1:
            return f"its share of {budget} bytes holds no delta"
        return Delta(
            out_features=rows,
            in_features=columns,
            rank=rank,
            kept_u=kept_u,
            kept_v=kept_v,
            bits=self.bits,
            masks=self.masks,
            seed=seed_of(self.seed, path),
        )

    def compress(self, block: Block, wanted: Mapping[str, Module]) -> Compressed:
        """`loss` is E||dW - dW'||^2 / ||dW||^2 over all masks, before rounding: relative to the
        difference, not to the weight. It may exceed 1, what the base alone would lose: most of
        it is variance without bias, which the sums of a product average out.

        Raises SvdError where the base model lacks a weight, or has it in another shape.
        """
        base, found = _base_of(block, wanted), {}
        for path, module in wanted.items():
            assert isinstance(module, Delta)  # of modules_at, never of a user
            delta = block.weights[path].double() - base[path].double()
            factors, loss = self.sparsified(delta, module)
            found[path] = Factorization(factors.on(base[path]), loss)
        return Compressed(found)

    def sparsified(self, delta: torch.Tensor, module: Delta) -> tuple[DeltaFactors, float]:
        """dW [m, n] without its base, and what the masks cost on average."""
        U, s, Vt = torch.linalg.svd(delta.double(), full_matrices=False)  # noqa: N806
        sides, energy, s = {"U": U.T, "V": Vt}, s.square().sum(), s[: module.rank]
        fractions = kept_fractions(s, module, self.exponent)
        unbiased = fractions > 0
        factors, counts, stays = {}, {}, torch.ones_like(s)
        for name, (length, entries) in module.factors().items():
            counts[name] = counts_of(fractions, length, entries)
            fraction = counts[name].double() / length
            rescale = torch.where(unbiased, 1 / fraction, 1.0)
            factors[name] = sides[name][: module.rank] * (s.sqrt() * rescale)[:, None]
            stays = stays * fraction
        # E||u' v'^T||^2 is 1 / stays if rescaled, and stays if not, for unit vectors u and v.
        explained = torch.where(unbiased, 2 - 1 / stays, stays) * s.square()
        loss = float(1 - explained.sum() / energy) if energy > 0 else 0.0
        return DeltaFactors.pack(module, factors, counts), loss


def seed_of(seed: int, path: str) -> int:
    """32 bits for the masks of one weight, the same in every run and in every order."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def kept_fractions(s: torch.Tensor, module: Delta, exponent: float) -> torch.Tensor:
    """1 - p_k [r] of singular values s [r], neither ascending; 0 for the tail that is dropped.

    Their sum is at most the entries of a factor in columns; less than one column is left over.
    """
    shorter = min(module.out_features, module.in_features)
    columns = min(kept / length for length, kept in module.factors().values())
    ratio = (s / s[0]).pow(exponent) if s[0] > 0 else torch.zeros_like(s)
    fractions = 1 - (1 - columns / len(s)) * (1 - ratio)
    stays = (fractions.cumsum(0) <= columns) & (fractions * shorter >= 1)
    return torch.where(stays, fractions, 0.0)


def counts_of(fractions: torch.Tensor, length: int, entries: int) -> torch.Tensor:
    """Entries [r] of each column, not ascending, `entries` together.

    What the fractions leave fills the leading columns and then, where these are whole, the next:
    too few entries to be divided by 1 - p_k, but as they are they only shrink the error. Rounded
    by largest remainders.
    """
    room = 1 - fractions
    left = entries / length - float(fractions.sum())
    filled = (left - (room.cumsum(0) - room)).clamp_min(0).minimum(room)
    exact = (fractions + filled) * length
    counts = exact.floor()
    missing = entries - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts.long()


def _base_of(block: Block, wanted: Mapping[str, Module]) -> Mapping[str, torch.Tensor]:
    remedy = "Remedy: set weights.method.base to the model that this one was fine-tuned from"
    if block.base is None:
        raise SvdError(f"impart stores the difference from a base model; none was given\n{remedy}")
    problems = []
    for path in wanted:
        tuned = list(block.weights[path].shape)
        if path not in block.base:
            problems.append(f"{path}.weight: not in the base model")
        elif (shape := list(block.base[path].shape)) != tuned:
            problems.append(f"{path}.weight: {shape} in the base model, here {tuned}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise SvdError(f"the base model does not fit this one:{listed}\n{remedy}")
    return block.base
