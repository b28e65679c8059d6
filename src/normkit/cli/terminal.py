"""The one way from a command to the terminal: every text passes `printable` here."""

from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ..printable import printable

__all__ = ["INTERRUPTED", "TOLD_INTERRUPT", "Terminal", "echo"]

INTERRUPTED = 130
# What a command returns that was interrupted and has said itself what is kept; the process leaves with 130.
TOLD_INTERRUPT = -INTERRUPTED


def echo(text: str, *, err: bool = False, colour: str | None = None) -> None:
    """Print lines of text."""
    typer.secho(printable(text), err=err, fg=colour)


class Terminal(Console):
    """rich's console, in which text that comes from names cannot steer the terminal; rich's own codes can."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with what is in the text shown."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)

    def render_str(self, text: str, **settings: Any) -> Any:
        """Read markup as rich does; the width of a table counts what will be shown."""
        return super().render_str(printable(text), **settings)
