"""How long work reports its progress, without knowing who shows it."""

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(stage, done, total)`; `done` counts units of that stage, from 0."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""
