"""Plots of measurements, all drawn alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import require_matplotlib


def draw(path: Path, paint: Callable[[Any], object], rows: int = 1, columns: int = 1, **options: Any) -> None:
    """Save as PNG what `paint` draws on the axes [rows, columns] of a figure; options as in `pyplot.subplots`.

    Warns where matplotlib is missing, as it may be on a machine of GPUs: the numbers, which took long, are in JSON.
    """
    try:
        require_matplotlib()
    except ModuleNotFoundError as error:
        warnings.warn(f"{path} is not drawn: {error}", stacklevel=2)
        return
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, layout="constrained", squeeze=False, **options)
    paint(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def over_sizes(ax: Any, sizes: Iterable[int], ylabel: str) -> None:
    """Logarithmic axes over image sizes in pixels, each of which is named."""
    named = sorted(set(sizes))
    ax.set(xscale="log", yscale="log", xlabel="image size (px)", ylabel=ylabel)
    ax.set_xticks(named, list(map(str, named)), fontsize=8)
    ax.set_xticks([], minor=True)


def lines(ax: Any, rows: Iterable[Mapping[str, Any]], x: str, y: str, name: str | None = None, **style: Any) -> None:
    """A line over `x` for each value of the column `name`, or a single one; rows without a `y` are left out."""
    found: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(y):
            found.setdefault(row[name] if name else None, []).append((row[x], row[y]))
    for label, points in found.items():
        ax.plot(*zip(*sorted(points)), "o-", label=label, **style)
    if name and found:
        ax.legend(fontsize=7)


def draw_sizes(
    path: Path,
    panels: Sequence[tuple[str, Sequence[Mapping[str, Any]], str]],
    *,
    x: str = "px",
    name: str | None = None,
    columns: int | None = None,
) -> None:
    """Columns of rows over image sizes: a panel for each (title, rows, column), a line for each value of `name`."""
    columns = columns or len(panels)

    def paint(axes: Any) -> None:
        for ax, (title, rows, y) in zip(axes.flat, panels, strict=True):
            lines(ax, rows, x, y, name)
            over_sizes(ax, (row[x] for row in rows), y)
            ax.set_title(title)
            if y == "MFU":  # shares of one ceiling, which do not differ by powers
                ax.set(yscale="linear", ylim=(0, 1))

    if panels:
        count = len(panels) // columns
        draw(path, paint, count, columns, figsize=(4.8 * columns, 4 * count))
