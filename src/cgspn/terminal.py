"""Terminal output that prints file names and errors literally, even if they contain markup."""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters (including terminal escapes), marks that reverse the direction of text, and the lone surrogates
# that Python uses for bytes that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

WIDE = 240  # columns without a terminal; the default of 80 would cut off tables


def plain(text: str) -> str:
    """The text with control characters shown as escapes, except for line breaks."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class PlainConsole(Console):
    """A console that prints markup, emoji names and control characters literally."""

    def __init__(self, **settings: Any) -> None:
        """settings: those of rich's Console."""
        super().__init__(markup=False, emoji=False, highlight=False, **settings)
        if not self.is_terminal and self._width is None:
            self.width = WIDE

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Like rich's, with escaped text. rich's own control segments, as of progress bars, are kept."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def warn(message: str) -> None:
    """Print a message on standard error."""
    PlainConsole(stderr=True).print(message, soft_wrap=True)
