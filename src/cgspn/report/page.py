"""The HTML page of every report: self-contained, readable on a phone, with light and dark mode.

It makes no network requests and has only the report's own scripts. Pictures are data URIs, and charts inline SVGs.
Functions here return HTML. Arguments such as `text` and `title` are plain text and are escaped; `body` is HTML.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Section:
    """A part of a page. key: anchor of letters, digits and dashes. short: name in the table of contents; the title if
    empty."""

    key: str
    title: str
    body: str
    short: str = ""


def asset(name: str) -> str:
    """The text of a style or script next to this module."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8").strip()


def page(
    title: str, lead: str, sections: Sequence[Section], *, footer: str = "", style: str = "", script: str = ""
) -> str:
    """A complete HTML document. Raises ValueError for two sections with the same key.

    lead: one or two sentences below the title. style, script: CSS and JavaScript for this page only.
    """
    keys = [section.key for section in sections]
    if len(set(keys)) < len(keys):
        raise ValueError(f"sections has the keys {keys}; expected each once")
    links = "".join(f'<li><a href="#{s.key}">{_(s.short or s.title)}</a></li>' for s in sections)
    bodies = "\n".join(
        f'<section id="{s.key}" aria-labelledby="{s.key}-title">\n<h2 id="{s.key}-title">{_(s.title)}</h2>\n'
        f"{s.body}\n</section>"
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_(title)}</title>
<style>
{asset("page.css")}
{style.strip()}
</style>
</head>
<body>
<header>
<h1>{_(title)}</h1>
<p class="lead">{_(lead)}</p>
<nav aria-label="Contents"><ol>{links}</ol></nav>
</header>
<main>
{bodies}
</main>
<footer>{_(footer)}</footer>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text. kind "read" marks reading instructions."""
    return f'<p class="{kind}">{_(text)}</p>' if kind else f"<p>{_(text)}</p>"


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{_(text)}</h3>"


def card(what: str, value: str, note: str = "", colour: str = "var(--rule)") -> str:
    """A card with an important number. colour: CSS."""
    return (
        f'<div class="card" style="--accent: {colour}"><div class="what">{_(what)}</div>'
        f'<div class="value">{_(value)}</div><div class="note">{_(note)}</div></div>'
    )


def group(parts: Sequence[str], kind: str) -> str:
    """HTML parts side by side. kind: "cards", or "wide" for as many as fit."""
    return f'<div class="{kind if kind == "cards" else f"grid {kind}"}">{"".join(parts)}</div>'


def picture(uri: str, alt: str, caption: str = "", note: str = "") -> str:
    """An image with a caption, a name in bold and a note. alt: alternative text."""
    return f'<figure><img src="{uri}" alt="{_(alt)}" loading="lazy">{_caption(caption, note)}</figure>'


def panel(body: str, caption: str, note: str = "") -> str:
    """A framed chart with a caption above it."""
    return f'<figure class="panel">{_caption(caption, note)}{body}</figure>'


def scroll(body: str, label: str) -> str:
    """A table that scrolls sideways on narrow screens, by touch and keyboard."""
    return f'<div class="scroll" role="region" aria-label="{_(label)}" tabindex="0">{body}</div>'


def fact_list(facts: Mapping[str, str]) -> str:
    """A list of names and values."""
    return "<dl>" + "".join(f"<dt>{_(k)}</dt><dd>{_(v)}</dd>" for k, v in facts.items()) + "</dl>"


def colour_scale(colours: Sequence[tuple[float, float, float]], low: str, high: str) -> str:
    """A colour bar with labels at its ends."""
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in colour)) for colour in colours)
    return (
        f'<div class="scale"><span>{_(low)}</span><i style="background: linear-gradient(90deg, {stops})"></i>'
        f"<span>{_(high)}</span></div>"
    )


def words(items: Sequence[str]) -> str:
    """Join items to a phrase: "a, b and c"."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def _caption(caption: str, note: str) -> str:
    if not caption and not note:
        return ""
    strong = f"<strong>{_(caption)}</strong>" if caption else ""
    return f"<figcaption>{strong}{'<br>' if caption and note else ''}{_(note)}</figcaption>"


def _(text: str) -> str:
    return html.escape(text)
