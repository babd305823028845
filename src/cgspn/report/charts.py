"""Line charts as inline SVGs with real text and with colours that follow the page's light or dark mode."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

# Colours of a light page by name; page.css overrides them for a dark one. Each model has the same colour in every
# chart, and a marker to distinguish it without colours. Other names cycle through the last colours.
COLOURS = {"muted": "#5d676f", "rule": "#e2dfd8"}
COLOURS |= {"teacher": "#3d4650", "C-GSPN": "#0b8a8c", "ViT": "#c8690a", "converted": "#9aa2a9"}
COLOURS |= {"other-1": "#6a4fb3", "other-2": "#b8336a", "other-3": "#4c7a1f"}
MARKERS = {"teacher": "D", "C-GSPN": "o", "ViT": "s", "converted": "^"}
SIZE = (4.3, 2.5)  # inches; at 72 dpi about as wide as a phone, so text is not scaled there
PLACE = (0.13, 0.17, 0.85, 0.8)  # of the axes, equal in all charts, so that panels align
LOG_RATIO = 6.0  # wider positive ranges get a logarithmic axis


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, naming the extra to install, if charts cannot be drawn.

    Called before long jobs that end with a report.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "charts need matplotlib, which is not installed; run: pip install 'cgspn[report]'", name="matplotlib"
        ) from error


def css(colour: str) -> str:
    """One of COLOURS as CSS: the page's variable of that name, or the colour itself."""
    return f"var(--{colour.lower()}, {COLOURS[colour]})"


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The colour of each name: its fixed one, or the next of three others."""
    others = cycle(name for name in COLOURS if name.startswith("other"))
    return {name: name if name in MARKERS else next(others) for name in names}


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction; the first value is unchanged."""
    out, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(average / total)
    return out


def thin(values: Sequence[float], most: int = 300) -> tuple[list[float], list[float]]:
    """Reduce a curve to at most `most` points (x, y), by means over equal numbers of steps."""
    size = -(-len(values) // most) if values else 1
    runs = [values[i : i + size] for i in range(0, len(values), size)]
    return [i * size + (len(run) - 1) / 2 for i, run in enumerate(runs)], [sum(run) / len(run) for run in runs]


def loss_chart(curves: Mapping[str, Sequence[float]], *, label: str) -> str:
    """A chart of losses over steps, with one colour per name: faint values and their moving average.

    curves: losses by name; names in MARKERS have fixed colours. label: alternative text of the chart.

    Returns an `<svg>` element. Raises ModuleNotFoundError without matplotlib, and ValueError for no curve or an empty
    one.
    """
    if not curves or not all(curves.values()):
        raise ValueError(
            f"curves holds { ({k: len(v) for k, v in curves.items()}) } losses; expected at least one each"
        )
    figure, axes = _axes()
    colours = colours_of(curves)
    shown: list[float] = []
    for name, values in curves.items():
        colour = COLOURS[colours[name]]
        # over a fortieth of the steps: losses of mixed sizes differ from step to step
        average = smooth(values, 1 - 1 / max(7, len(values) / 40))
        for line, style in ((values, {"linewidth": 0.8, "alpha": 0.35}), (average, {"linewidth": 1.9})):
            x, y = thin(line)
            axes.plot(x, y, color=colour, clip_on=False, **style)
            shown += y
    _scale(axes, shown)
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    return _svg(figure, label)


def block_chart(
    values: Mapping[str, Sequence[float]], *, label: str, limits: tuple[float | None, float | None] = (None, None)
) -> str:
    """A chart with one value per block, and one line per name. Otherwise like `loss_chart`.

    limits: limits of the vertical axis; None for the range of the values.
    """
    if not values or not all(values.values()):
        raise ValueError("values is empty; expected one value per block")
    figure, axes = _axes()
    colours = colours_of(values)
    for name, line in values.items():
        blocks = range(1, len(line) + 1)
        colour, marker = COLOURS[colours[name]], MARKERS.get(name, "o")
        axes.plot(blocks, line, color=colour, marker=marker, markersize=4.5, linewidth=1.7, clip_on=False)
    if limits == (None, None):
        _scale(axes, [v for line in values.values() for v in line])
    else:
        axes.set_ylim(*limits)
    count = max(map(len, values.values()))
    axes.set_xticks(range(1, count + 1, -(-count // 12)))
    axes.set_xlabel("block")
    axes.margins(x=0.04)
    return _svg(figure, label)


def _axes() -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    axes = figure.add_axes(PLACE)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])
    axes.tick_params(which="both", colors=COLOURS["muted"], labelsize=8.5, length=0)
    axes.tick_params(axis="x", which="major", length=3)
    axes.xaxis.label.set(color=COLOURS["muted"], fontsize=8.5)
    axes.grid(axis="y", which="major", color=COLOURS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Set a logarithmic axis with plain numbers for a wide range, otherwise one that starts at zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.15, high * 1.15)
    elif low >= 0:
        axes.set_ylim(0, high * 1.08 if high > 0 else 1)


def _svg(figure: Any, label: str) -> str:
    """The figure as an inline SVG without fixed size and metadata, with unique ids and the page's colours."""
    import matplotlib

    salt = hashlib.sha256(label.encode()).hexdigest()[:8]
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # a style in an inline SVG applies to the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'font: (\d[\d.]*px)[^;"]*', r"font-size: \1", text)
    text = re.sub(r'<g id="[^"]+">', "<g>", text)  # elements that are referenced have unique ids from the salt
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    assert view is not None
    head = (
        f'<svg class="chart" role="img" aria-label="{html.escape(label)}" {view.group()} '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    )
    text = f"{head}>{re.sub(chr(10) + ' *', chr(10), rest)}".strip()
    for name, colour in COLOURS.items():
        text = text.replace(colour, css(name))
    return text


def legend(names: Sequence[str]) -> str:
    """A legend in HTML for all charts below it."""
    shapes = {"o": "●", "s": "■", "^": "▲", "D": "◆"}
    colours = colours_of(names)
    items = [
        f'<li><span style="color: {css(colours[name])}" aria-hidden="true">'
        f"━{shapes[MARKERS.get(name, 'o')]}━</span> {html.escape(name)}</li>"
        for name in names
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
