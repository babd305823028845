"""A table of models (rows) and metrics (columns), for the terminal, JSON and HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

NONE = "–"


NAME = 20  # width that a row's name keeps before numbers are wrapped


@dataclass(frozen=True)
class Metric:
    """A column, with its name in rows and in JSON (`key`) and its heading (`label`).

    scale: factor for display, such as 100 for fractions shown as per cent. unit: shown after the label, such as "%" or
    "ms". digits: number of decimals. higher_is_better: None if no value is better (a size, a count). averaged: whether
    it is included in the macro average.
    """

    key: str
    label: str
    scale: float = 1.0
    unit: str = ""
    digits: int = 1
    higher_is_better: bool | None = True
    averaged: bool = False

    def show(self, value: float | None) -> str:
        """The value as text; a dash for None."""
        return NONE if value is None else f"{value * self.scale:.{self.digits}f}"

    @property
    def heading(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass
class SummaryTable:
    """Rows of values with a macro average: the plain mean over the metrics marked as averaged.

    A row without one of these metrics has no average, because averages over different metrics cannot be compared.

    metrics: the columns; averaged metrics must have the same scale, unit and direction. rows: values by row name and
    metric key; filled by `add`. Raises ValueError for duplicate keys, or averaged metrics that cannot be compared.
    """

    title: str
    metrics: Sequence[Metric]
    rows: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = tuple(self.metrics)
        keys = [m.key for m in self.metrics]
        if len(set(keys)) < len(keys):
            raise ValueError(f"metrics has the keys {keys}; expected each once")
        if len({(m.scale, m.unit, m.higher_is_better) for m in self.metrics if m.averaged}) > 1:
            raise ValueError("metrics that are averaged must share scale, unit and higher_is_better")
        given, self.rows = self.rows, {}
        for name, values in given.items():
            self.add(name, values)

    def add(self, name: str, values: Mapping[str, float | None]) -> None:
        """Add a row, or replace the row of that name. A missing metric or None is shown as a dash.

        Raises ValueError for an unknown key, or a value that is not finite.
        """
        unknown = sorted(set(values) - {m.key for m in self.metrics})
        if unknown:
            raise ValueError(f"row {name!r} has {unknown[0]!r}; accepted: {', '.join(m.key for m in self.metrics)}")
        for key, value in values.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"row {name!r} has {key} = {value}; accepted: finite numbers or None")
        self.rows[name] = {m.key: values.get(m.key) for m in self.metrics}

    def average(self, name: str) -> float | None:
        """Return the macro average of a row; None if a value is missing or no metric is averaged."""
        values = [self.rows[name][m.key] for m in self.metrics if m.averaged]
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def _cells(self) -> tuple[list[str], list[list[tuple[str, bool]]]]:
        """The headings, and for each row its texts with flags for the best value of a column."""
        columns = [(m, [row[m.key] for row in self.rows.values()]) for m in self.metrics]
        averaged = [m for m in self.metrics if m.averaged]
        if len(averaged) > 1:
            columns.append((replace(averaged[0], label="macro average"), [self.average(name) for name in self.rows]))
        rows: list[list[tuple[str, bool]]] = [[] for _ in self.rows]
        for metric, values in columns:
            known, best = [v for v in values if v is not None], None
            if len(set(map(metric.show, known))) > 1 and metric.higher_is_better is not None:  # else no best
                best = metric.show(max(known) if metric.higher_is_better else min(known))
            # Compared as text, so that values that look equal are marked equally.
            for row, text in zip(rows, map(metric.show, values)):
                row.append((text, text == best))
        return [metric.heading for metric, _ in columns], rows

    def to_rich(self) -> RichTable:
        """Return a table for a rich console, with the best value of each column in bold."""
        headings, rows = self._cells()
        # narrow enough for 80 columns; longer content is wrapped, not truncated
        table = RichTable(title=Text(self.title), box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold", min_width=min(NAME, max(map(len, self.rows), default=0)))
        for heading in headings:
            longest = max(map(len, heading.split()))
            table.add_column(Text(heading), justify="right", overflow="fold", min_width=longest)
        for name, cells in zip(self.rows, rows):
            table.add_row(Text(name), *(Text(text, style="bold" if best else "") for text, best in cells))
        return table

    def to_json(self) -> str:
        """Return title, metrics, unscaled rows and averages as JSON."""
        return json.dumps(
            {
                "title": self.title,
                "metrics": [asdict(m) for m in self.metrics],
                "rows": self.rows,
                "averages": {name: self.average(name) for name in self.rows},
            },
            indent=2,
        )

    def to_html(self) -> str:
        """Return a `<table>` element without styles, with the best value of each column in `<strong>`."""
        headings, rows = self._cells()
        lines = [f"<table>\n<caption>{html.escape(self.title)}</caption>", "<thead><tr><th></th>"]
        lines += [f'<th scope="col">{html.escape(heading)}</th>' for heading in headings]
        lines.append("</tr></thead>\n<tbody>")
        for name, cells in zip(self.rows, rows):
            inner = "".join(f"<td>{f'<strong>{t}</strong>' if best else t}</td>" for t, best in cells)
            lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{inner}</tr>')
        return "\n".join([*lines, "</tbody>\n</table>"])
