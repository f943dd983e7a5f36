"""One line per step with elapsed seconds; a live spinner where stdout is a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)


class Step:
    """A step under way: what it adds with `note` ends up on its closing line."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.notes: list[str] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        self.notes.append(text)

    def line(self, text: str) -> None:
        """Print an intermediate result of a long step at once."""
        console.print(f"    {escape(text)} [dim]({self.seconds:.0f} s)[/dim]")


@contextmanager
def step(what: str) -> Iterator[Step]:
    """Announce `what`, then close with the seconds it took, or with `failed`."""
    current = Step()
    what = escape(what)
    if not console.is_terminal:
        console.print(f"[...] {what}", markup=False)
    try:
        with console.status(what):
            yield current
    except BaseException:
        console.print(f"[red]failed[/red] {what} [dim]after {current.seconds:.1f} s[/dim]")
        raise
    tail = f": {escape(', '.join(current.notes))}" if current.notes else ""
    console.print(f"[green]done[/green] {what}{tail} [dim]({current.seconds:.1f} s)[/dim]")
