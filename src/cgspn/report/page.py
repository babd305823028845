"""The HTML page of every report: self-contained, readable on a phone, with light and dark mode.

It makes no network requests and has only the report's own scripts. Pictures are data URIs, and charts inline SVGs.
Functions here return HTML. Arguments such as `text` and `title` are plain text and are escaped; `body` is HTML.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .theme import variables

STYLE = """
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3.5rem; }
h1 { font-size: clamp(1.8rem, 5vw, 2.7rem); line-height: 1.12; letter-spacing: -0.02em; margin: 0 0 .75rem;
  text-wrap: balance; }
h2 { font-size: 1.45rem; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 2rem 0 .25rem; }
p { max-width: 44rem; margin: .5rem 0; text-wrap: pretty; }
p.lead { font-size: 1.12rem; color: var(--muted); }
p.read { border-left: 3px solid var(--link); padding-left: .9rem; margin: .9rem 0 1.25rem; }
a { color: var(--link); }
code { font-size: .92em; overflow-wrap: anywhere; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: 1.5rem 0 0; padding: .8rem 0;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); font-size: .92rem; }
nav a { text-decoration: none; }
nav a:hover, nav a:focus { text-decoration: underline; }
section { padding: 2.6rem 0 .5rem; scroll-margin-top: .5rem; }
section + section { margin-top: 1.4rem; border-top: 1px solid var(--rule); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .86rem; line-height: 1.4; color: var(--muted); margin-top: .35rem; }
figcaption strong { color: var(--ink); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.card, .panel { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem; padding: 1rem 1.1rem; }
.card { border-top: 4px solid var(--accent, var(--rule)); }
.card .what { font-size: .86rem; color: var(--muted); line-height: 1.35; }
.card .value { font-size: 2.1rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.card .note { font-size: .86rem; line-height: 1.4; }
.grid { display: grid; gap: 1rem; margin: 1rem 0; align-items: start; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); align-items: stretch; }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.four { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.panel figcaption { margin: 0 0 .3rem; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart text { font-family: inherit; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: .3rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .6rem 0; padding: 0;
  font-size: .92rem; }
.legend span { letter-spacing: -.12em; margin-right: .35em; white-space: nowrap; }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .86rem; color: var(--muted); margin: .8rem 0; }
.scale i { flex: 0 1 11rem; height: .7rem; border-radius: .35rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: .7rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .9rem 1.1rem .5rem; font-size: .9rem; color: var(--muted); }
th, td { padding: .5rem 1.1rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
thead th { font-size: .84rem; font-weight: 500; color: var(--muted); vertical-align: bottom; white-space: normal;
  min-width: 6.2rem; line-height: 1.3; }
tbody th { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--card); }
td strong { color: var(--link); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.5rem; margin: 1rem 0; font-size: .92rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { padding-top: 2rem; padding-bottom: 3rem; font-size: .86rem; color: var(--muted); }
@media (max-width: 40rem) {
  header { padding-top: 2rem; }
  .four { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .7rem; }
  .three { gap: .5rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  .card { padding: .7rem .8rem; }
  .card .value { font-size: 1.6rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
  th, td { padding: .45rem .8rem; }
}
@media print { nav { display: none; } .panel, .card, figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: anchor of letters, digits and dashes.
        title: heading, plain text.
        body: HTML.
        short: name in the table of contents; the title if empty.
    """

    key: str
    title: str
    body: str
    short: str = ""


def page(
    title: str, lead: str, sections: Sequence[Section], *, footer: str = "", style: str = "", script: str = ""
) -> str:
    """A complete HTML document.

    Args:
        title: plain text.
        lead: one or two sentences below it, plain text.
        sections: the sections in order.
        footer: plain text.
        style: CSS for this page only.
        script: JavaScript for this page, run after loading.

    Raises:
        ValueError: two sections with the same key.
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
:root {{ color-scheme: light dark; {variables(dark=False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(dark=True)} }} }}
{STYLE.strip()}
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
    """HTML parts side by side. kind: "cards", "wide" (as many as fit), "three" or "four" columns."""
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
