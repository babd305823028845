"""The common settings and the output of `cgspn eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..console import console, progress_watcher
from ..data.sizes import Size, parse_size
from ..data.skipped import Skipped
from ..environment import describe
from ..evaluate.measure import MAX_SKIPPED, Watch
from ..evaluate.table import Metric, SummaryTable
from ..models.checkpoint import write_atomically
from ..report.drawing import draw
from ..terminal import warn
from .checks import check_file, device_of
from .command import Command, Device

NOT_PRINTED = ("@10", "top5")  # only in JSON, to save width


@dataclass(frozen=True, kw_only=True)
class Evaluation(Command):
    """The settings of every evaluation."""

    batch_size: int = 64
    """Batch size."""
    device: Device = "auto"
    """Device to run on; "auto" uses a GPU if there is one."""
    out: Path | None = None
    """JSON file for the table, all measurements, the command, versions and commit."""
    overwrite: bool = False
    """Replace existing files."""
    plot: Path | None = None
    """PNG file for the plot over several sizes. The default is next to the file given by --out."""
    max_skipped: float = MAX_SKIPPED
    """Largest tolerated fraction of unreadable images, 0 to 1."""


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers added to duplicates."""
    return [f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def percents(sources: Sequence[str]) -> list[Metric]:
    """A percentage metric per model, with the last part of its source as heading."""
    titles = distinct([Path(source).name or source for source in sources])
    return [Metric(source, title, 100, "%") for source, title in zip(sources, titles, strict=True)]


def typed_sizes(texts: Sequence[str]) -> list[Size]:
    """The distinct sizes of `--size`; None means the native size. Raises ValueError for an invalid size."""
    return list(dict.fromkeys(parse_size(str(text)) for text in texts)) or [None]


def check_metrics() -> None:
    """Raise ValueError with the reason if torchmetrics cannot be imported, before the work starts."""
    try:
        import torchmetrics.classification  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise ValueError(
            f"torchmetrics cannot be imported: {error}; a torchvision built for another torch than the one installed "
            "has this effect: install both from the same index, or uninstall torchvision"
        ) from error


@dataclass
class Report:
    """The output of an evaluation: progress, skipped files, the table, JSON.

    several: whether each model is measured at several sizes. Raises ValueError for a missing device, settings out of
    range, or files that cannot be written.
    """

    title: str
    settings: Evaluation
    seeds: dict[str, int]
    several: bool
    sizes: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, list[Metric]] = field(default_factory=dict)
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_metrics()
        given = self.settings
        self.device = device_of(given.device)
        if given.batch_size < 1:
            raise ValueError(f"batch_size is {given.batch_size}; accepted: 1 or more")
        if not 0 <= given.max_skipped <= 1:
            raise ValueError(f"max_skipped is {given.max_skipped}; accepted: 0 to 1")
        self.plot = given.plot
        if self.several and self.plot is None and given.out is not None:
            self.plot = given.out.with_suffix(".png")
        for name, path, kind in (("out", given.out, "JSON"), ("plot", self.plot, "PNG")):
            if path is not None:
                check_file(path, name, f"the name of a {kind} file", given.overwrite)

    @contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Watch]:
        """A progress bar over `steps` images."""
        with progress_watcher() as watcher:
            step = watcher(title, steps)

            def watch(count: int) -> None:
                for _ in range(count):
                    step({})

            yield watch

    def row(self, source: str, size: tuple[int, ...]) -> str:
        """The row name of a model, with the size (height, width) or shorter side if there are several."""
        square = len(size) == 1 or size[0] == size[1]
        name = f"{source} at {size[0] if square else 'x'.join(map(str, size))} px" if self.several else source
        self.sizes[name] = (source, size)
        return name

    def skip(self, data: str, skipped: Skipped) -> None:
        """Print what was skipped, once for all models."""
        if skipped and data not in self.left_out:
            self.left_out[data] = {"total": skipped.total, "files": dict(skipped.files)}
            warn(f"{data}: {skipped.summary()}")

    def add(self, model: str, data: str, values: dict[Metric, float]) -> None:
        """Add the metrics of a model on a dataset."""
        known = self.metrics.setdefault(data, [])
        known += [metric for metric in values if metric not in known]
        self.detail(model, data, {metric.key: value for metric, value in values.items()})

    def detail(self, model: str, data: str, values: dict[str, Any]) -> None:
        """Add details for JSON only."""
        self.measured.setdefault(model, {}).setdefault(data, {}).update(values)

    def table(self) -> SummaryTable:
        """The table with models as rows, and the metrics of each dataset as columns."""
        one = len(self.metrics) == 1
        columns = {
            (data, metric.key): replace(
                metric, key=f"{data}/{metric.key}", label=metric.label if one else f"{data} {metric.label}"
            )
            for data, metrics in self.metrics.items()
            for metric in metrics
            if not (metric.key.endswith(NOT_PRINTED) or self._repeats(data, metric))
        }
        title = f"{self.title} on {', '.join(self.metrics)}"
        table = SummaryTable(title, list(columns.values()))
        for model, found in self.measured.items():
            table.add(model, {metric.key: found[data][key] for (data, key), metric in columns.items()})
        return table

    def _repeats(self, data: str, metric: Metric) -> bool:
        """Whether a column equals top-1: a mean over classes of equal size, or captions from class names."""
        found = [values[data] for values in self.measured.values()]
        if metric.key == "per_class":
            return all(math.isclose(values[metric.key], values["top1"], abs_tol=1e-6) for values in found)
        return metric.key == "image_to_text@1" and all("top1" in v and "image_to_text@5" not in v for v in found)

    def finish(self) -> None:
        """Print the table, and write plot and JSON if requested. Raises OSError."""
        table = self.table()
        console.print(table.to_rich())
        if len({size for _, size in self.sizes.values()}) > 1 and not self.several:
            native = (f"{row} {'x'.join(map(str, dict.fromkeys(size)))} px" for row, (_, size) in self.sizes.items())
            console.print(f"each at its native size: {', '.join(native)}; --size compares them at one", soft_wrap=True)
        if self.plot is not None:
            plot_scores(table, self.sizes, self.plot)
            if self.plot.exists():  # missing without matplotlib, after a warning
                console.print(f"wrote {self.plot}", soft_wrap=True)
        if (out := self.settings.out) is None:
            return
        record = {
            **describe(),
            "torchmetrics": metadata.version("torchmetrics"),
            "device": self.device,
            "seeds": self.seeds,
            "sizes": {row: {"model": source, "pixels": size} for row, (source, size) in self.sizes.items()},
            "results": self.measured,
            "skipped": self.left_out,
            "table": json.loads(table.to_json()),
        }
        write_atomically(out, json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {out}", soft_wrap=True)


def plot_scores(table: SummaryTable, sizes: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Plot each metric over the size, one line per model, as PNG. sizes: model and sides in pixels of each row."""

    def paint(axes: Any) -> None:
        for ax, metric in zip(axes[0], table.metrics):
            for source in dict.fromkeys(source for source, _ in sizes.values()):
                points = [
                    (math.prod(size) ** (1 / len(size)), value * metric.scale)
                    for row, (of, size) in sizes.items()
                    if of == source and (value := table.rows[row][metric.key]) is not None
                ]
                ax.plot(*zip(*sorted(points)), "o-", label=source)
            ax.set(xlabel="image size (px)", ylabel=metric.heading)
            ax.legend(fontsize=8)

    draw(path, paint, columns=len(table.metrics), figsize=(4.5 * len(table.metrics), 3.6))
