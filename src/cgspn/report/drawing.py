"""Plots of measurements with a common style."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import require_matplotlib


def draw(path: Path, paint: Callable[[Any], object], rows: int = 1, columns: int = 1, **options: Any) -> None:
    """Create a figure, let `paint` draw on its axes [rows, columns], and save it as PNG. options: of `pyplot.subplots`.

    Without matplotlib it only warns, so that the measurements in JSON are not lost.
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
    """Set logarithmic axes over image sizes in pixels, with a label for each size."""
    named = sorted(set(sizes))
    ax.set(xscale="log", yscale="log", xlabel="image size (px)", ylabel=ylabel)
    ax.set_xticks(named, list(map(str, named)), fontsize=8)
    ax.set_xticks([], minor=True)


def lines(ax: Any, rows: Iterable[Mapping[str, Any]], x: str, y: str, name: str | None = None, **style: Any) -> None:
    """Draw a line over `x` for each value of the column `name`, or one line. Rows without a `y` are left out."""
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
    """Plot columns over image sizes, with a panel per (title, rows, column) and a line per value of `name`."""
    columns = columns or len(panels)

    def paint(axes: Any) -> None:
        for ax, (title, rows, y) in zip(axes.flat, panels, strict=True):
            lines(ax, rows, x, y, name)
            over_sizes(ax, (row[x] for row in rows), y)
            ax.set_title(title)
            if y == "MFU":  # fractions of one peak need a linear axis
                ax.set(yscale="linear", ylim=(0, 1))

    if panels:
        count = len(panels) // columns
        draw(path, paint, count, columns, figsize=(4.8 * columns, 4 * count))
