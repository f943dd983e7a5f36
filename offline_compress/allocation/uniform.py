"""Uniform allocation: every matrix keeps the same fraction."""

from fractions import Fraction
from typing import ClassVar, Literal

from offline_compress.allocation.allocator import Allocator, Asks, Evidence, Shares


class Uniform(Allocator):
    """The same share for every matrix."""

    paper: ClassVar[str] = "the usual convention of the field"

    name: Literal["uniform"] = "uniform"

    @property
    def asks(self) -> frozenset[Asks]:
        return frozenset()

    def shares(self, kept: Fraction, evidence: Evidence) -> Shares:
        return dict.fromkeys(evidence.matrices, kept)
