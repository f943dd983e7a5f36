"""Errors of both packages: each states what was found, what is accepted, where, and the remedy."""

from collections.abc import Sequence


class SvdError(Exception):
    """Base of every error a user can cause; its message is complete without a traceback."""


class CheckpointFormatError(SvdError):
    """A checkpoint directory that does not follow docs/checkpoint_format.md."""

    def __init__(self, where: str, problems: Sequence[str], remedy: str) -> None:
        self.where = where
        self.problems = tuple(problems)
        self.remedy = remedy
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{where} is not a valid svd checkpoint:{listed}\nRemedy: {remedy}")


class UnsupportedModelError(SvdError):
    """A model, or a way of serving it, that the project does not support."""

    def __init__(self, what: str, accepted: str, remedy: str) -> None:
        super().__init__(f"{what}\nSupported: {accepted}\nRemedy: {remedy}")
