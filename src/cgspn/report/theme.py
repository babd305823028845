"""Colours of the reports, as CSS variables for pages and for charts.

matplotlib does not support CSS variables. So charts are drawn in the colours of the light page, which are replaced by
variables in the SVG. The same chart then works in light and dark mode.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A colour of the page.

    Attributes:
        name: of the CSS variable, without dashes.
        light: hex value on a light page.
        dark: hex value on a dark page.
    """

    name: str
    light: str
    dark: str

    @property
    def css(self) -> str:
        """The colour as CSS."""
        return f"var(--{self.name})"


PAPER = Colour("paper", "#fbfaf7", "#14171a")
CARD = Colour("card", "#ffffff", "#1c2024")
INK = Colour("ink", "#1d2327", "#e8eaec")
MUTED = Colour("muted", "#5d676f", "#a2abb3")
RULE = Colour("rule", "#e2dfd8", "#31373d")
LINK = Colour("link", "#0b6e70", "#56cfc6")
PAGE_COLOURS = (PAPER, CARD, INK, MUTED, RULE, LINK)

# Each model has the same colour in every chart, and a marker to distinguish it without colours.
SERIES = {
    "teacher": Colour("series-teacher", "#3d4650", "#d4dae0"),
    "C-GSPN": Colour("series-cgspn", "#0b8a8c", "#3ec9bf"),
    "ViT": Colour("series-vit", "#c8690a", "#f3a64b"),
    "converted": Colour("series-converted", "#9aa2a9", "#727c85"),
}
OTHERS = (
    Colour("series-1", "#6a4fb3", "#b19cf0"),
    Colour("series-2", "#b8336a", "#f07fae"),
    Colour("series-3", "#4c7a1f", "#a3cf6d"),
)
MARKERS = {"teacher": "D", "C-GSPN": "o", "ViT": "s", "converted": "^"}
EVERY = (*PAGE_COLOURS, *SERIES.values(), *OTHERS)


def series_colours(names: list[str]) -> dict[str, Colour]:
    """A colour for each name: from SERIES if listed there, otherwise the next one of OTHERS."""
    strangers = [name for name in names if name not in SERIES]
    taken = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(strangers)}
    return {name: SERIES.get(name) or taken[name] for name in names}


def use_variables(svg: str) -> str:
    """Replace every colour of the light page in an SVG by its CSS variable."""
    for colour in EVERY:
        svg = svg.replace(colour.light, colour.css)
    return svg


def variables(dark: bool) -> str:
    """The declarations of all variables for one mode."""
    return " ".join(f"--{c.name}: {c.dark if dark else c.light};" for c in EVERY)
