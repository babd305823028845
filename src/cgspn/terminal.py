"""Terminal output that prints file names and errors literally, whatever markup they contain."""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters, among them those that begin a terminal's commands, marks that turn the direction of text around,
# and halves of characters, which Python has in the place of bytes that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

WIDE = 240  # columns where there is no terminal, whose 80 would cut the columns of tables


def plain(text: str) -> str:
    """A text with what a terminal might take for a command shown as escapes; lines stay lines."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class PlainConsole(Console):
    """A console that reads no markup, no emoji names and no control characters in what it is given."""

    def __init__(self, **settings: Any) -> None:
        """settings: as of rich's Console."""
        super().__init__(markup=False, emoji=False, highlight=False, **settings)
        if not self.is_terminal and self._width is None:
            self.width = WIDE

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's; its own commands, such as those of progress bars, are no text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def warn(message: str) -> None:
    """Print a message on standard error."""
    PlainConsole(stderr=True).print(message, soft_wrap=True)
