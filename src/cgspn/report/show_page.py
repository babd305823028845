"""The page of `cgspn show`: photographs, PCA visualisations, and heat maps that show.js draws."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import page
from .page import Section
from .pca import ColourBasis
from .photographs import SHOWN_SIDE, photograph_uri
from .pictures import HEAT, image_of, jpeg_uri
from .show import STUDENT, TEACHER, Show
from .show_data import View, packed

FLOWS = {
    "student-down": ("Student, downwards", "the scan from the top"),
    "student-up": ("Student, upwards", "the scan from the bottom"),
    "student-right": ("Student, rightwards", "the scan from the left"),
    "student-left": ("Student, leftwards", "the scan from the right"),
    "student-together": ("Student, all scans", "side by side"),
    "student-attention": ("Student, attention", "mean over the heads"),
    "teacher-together": ("Teacher, all scans", "side by side"),
    "teacher-attention": ("Teacher, attention", "mean over the heads"),
}


def show_page(shown: Show, models: Mapping[str, str], facts: Mapping[str, str]) -> str:
    """The page as one self-contained HTML document. models: display names by "teacher" and "student"."""
    seen_by = "an encoder and its teacher" if TEACHER in shown.colours else "an encoder"
    return page.page(
        "Features of an encoder",
        f"{len(shown.views)} photograph{'s' if len(shown.views) > 1 else ''} through {seen_by}: "
        "which patches have similar features, and which positions influence a patch in each layer.",
        [*show_sections(shown), Section("facts", "Settings and machine", page.fact_list({**models, **facts}), "Run")],
        footer="Made by cgspn show. This file is self-contained and makes no network requests.",
        **assets(),
    )


def assets() -> dict[str, str]:
    """Style and script of a page that holds `show_sections`."""
    return {"style": page.asset("show.css"), "script": f"const HEAT = {json.dumps(HEAT)};\n{page.asset('show.js')}"}


def show_sections(shown: Show, title: str = "How to read this page") -> list[Section]:
    """A reading guide, and a section per photograph, of which the first is open."""
    return [_reading(shown, title), *(_section(i, v, shown.colours) for i, v in enumerate(shown.views, 1))]


def _reading(shown: Show, title: str) -> Section:
    held = " and ".join(f"{basis.explained:.0%} of the {name}'s" for name, basis in shown.colours.items())
    text = (
        "Red, green and blue are the three principal components of a model's final features over all photographs, so "
        f"patches with similar features have similar colours. They explain {held} variance. Colours are interpolated "
        "between patches."
    )
    if TEACHER in shown.colours:
        agreed = page.words([f"{r:.2f}" for r in shown.colours[STUDENT].agreement or ()])
        text += f" The student's components are rotated to match the teacher's; their correlations are {agreed}."
    described = [d for v in shown.views for d in v.descriptors.values()]
    panels = (
        ("PCA visualisation of the features", text),
        (
            "Similarity to a patch",
            "Click or tap a patch, or choose one with the arrow keys. The heat map shows the cosine similarity of its "
            f"features to those of all patches. The page stores at most {max(len(d.steps) for d in described)} "
            f"bytes per patch, which keep {min(d.kept for d in described):.1%} or more of the squared norm. Cosines "
            f"are within {max(d.error for d in described):.3f} of the exact ones.",
        ),
        (
            "Influence on a patch",
            "A scan passes information from line to line, so each direction reaches a patch from a triangle. The heat "
            "map shows the square root of the influence of each position on the scan's output at the ringed patch, on "
            "one scale for all directions. For attention it shows the square root of the weight.",
        ),
    )
    body = [
        page.group([page.panel(page.paragraph(words), name) for name, words in panels], "wide"),
        page.colour_scale(HEAT, "least", "most"),
        "<noscript><p>The heat maps need JavaScript.</p></noscript>",
    ]
    return Section("reading", title, "\n".join(body), title)


def _section(number: int, seen: View, colours: Mapping[str, ColourBasis]) -> Section:
    photograph = seen.photograph
    name = photograph.name.encode("utf-8", "replace").decode("utf-8")  # as a page is UTF-8, and file names may not be
    height, width = photograph.pixels.shape[1:]
    grid = seen.features[STUDENT].shape[:2]
    note = f"{width} × {height} pixels, {grid[1]} × {grid[0]} patches"
    if seen.cells != tuple(grid):
        note += f", averaged to {seen.cells[1]} × {seen.cells[0]} clickable cells"
    if seen.agreement is not None:
        note += f". The mean cosine similarity of student and teacher is {seen.agreement:.2f}"
    uri, shape = photograph_uri(photograph), f'width="{width}" height="{height}"'
    smooth = "" if uri.startswith("data:image/png") else ' class="smooth"'
    figures = [
        f'<figure><img src="{uri}" alt="{html.escape(name)}" {shape}{smooth}>'
        "<figcaption><strong>Photograph</strong></figcaption></figure>"
    ]
    figures += [
        f'<figure><img src="{jpeg_uri(image_of(colours[who].picture(f)), SHOWN_SIDE)}" class="smooth" {shape} '
        f'alt="PCA visualisation of the {who}">'
        f"<figcaption><strong>{who.capitalize()}</strong>, PCA of the features</figcaption></figure>"
        for who, f in seen.features.items()
    ]
    heat = [
        f'<figure data-model="{who}">{_stage(f"Similarity to the chosen patch, {who}", active=True)}'
        f'<figcaption><strong>{who.capitalize()}</strong> <span class="range"></span></figcaption></figure>'
        for who in seen.features
    ]
    keys = dict.fromkeys(f"{flow.model}-{flow.kind}" for flows in seen.flows.values() for flow in flows)
    flows = [
        f'<figure data-flow="{key}">{_stage(f"{FLOWS[key][0]}, {FLOWS[key][1]}")}'
        f'<figcaption><strong>{FLOWS[key][0]}</strong><br><span class="half"></span></figcaption></figure>'
        for key in sorted(keys, key=list(FLOWS).index)
    ]
    points = [(chr(ord("A") + i), str(i)) for i in range(len(seen.points))]
    layers = [(str(layer), str(layer)) for layer in seen.flows]
    scales = [("shared", "shared"), ("separate", "own")] if len(seen.features) > 1 else []
    data = json.dumps(packed(seen)).replace("<", "\\u003c")
    body = f"""<p class="note">{html.escape(note)}.</p>
<div class="maps">{"".join(figures)}</div>
<details class="live"{" open" if number == 1 else ""} hidden>
<summary>Similarity and influence of patches</summary>
<h3>Similarity to a patch</h3>
<div class="choices">{_choice("Scale", "scale", scales)}<p class="readout" aria-live="polite"></p></div>
<div class="heat">{"".join(heat)}</div>
<h3>Influence on a patch, by layer</h3>
<div class="choices">{_choice("Patch", "point", points)}{_choice("Layer", "layer", layers)}</div>
<div class="flows">{"".join(flows)}</div>
</details>
<script type="application/json">{data}</script>"""
    ratio = f'<div class="photograph" style="--ratio: {width / height:.4f}">\n{body}\n</div>'
    return Section(f"photo-{number}", name, ratio, Path(name).stem)


def _stage(label: str, active: bool = False) -> str:
    """A photograph under a heat map that the script draws. `active` ones react to clicks and arrow keys."""
    role = 'role="application" tabindex="0"' if active else 'role="img"'
    return (
        f'<div class="stage{" active" if active else ""}" {role} aria-label="{html.escape(label)}">'
        '<img alt=""><canvas></canvas><i class="ring"></i></div>'
    )


def _choice(label: str, name: str, options: Sequence[tuple[str, str]]) -> str:
    if not options:
        return ""
    buttons = "".join(
        f'<button type="button" data-choice="{name}" data-value="{value}" aria-pressed="false">{text}</button>'
        for text, value in options
    )
    return f'<div class="choice" role="group" aria-label="{label}"><span>{label}</span>{buttons}</div>'
