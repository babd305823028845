"""What `cgspn eval` shows and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..console import console, progress_watcher
from ..data.skipped import Skipped
from ..environment import describe
from ..evaluate.measure import Watch
from ..evaluate.table import Metric, SummaryTable
from ..models.checkpoint import write_atomically
from .checks import check_folder, device_of

NOT_PRINTED = ("@10", "top5")  # in JSON alone, for the width of terminals


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def percents(sources: Sequence[str]) -> list[Metric]:
    """A column of shares for each model, headed by the last part of where it is from, which a table has room for."""
    titles = distinct([Path(source).name or source for source in sources])
    return [Metric(source, title, 100, "%") for source, title in zip(sources, titles, strict=True)]


def check_metrics() -> None:
    """Raise ValueError, with the reason, where torchmetrics does not import: before the work and not after it."""
    try:
        import torchmetrics.classification  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: from a torchvision that was built for another torch
        raise ValueError(
            f"torchmetrics does not import here: {error}; a torchvision built for another torch than the one installed "
            "has this effect: install both from the same index, or uninstall torchvision"
        ) from error


@dataclass
class Report:
    """What an evaluation shows and writes: progress, what was skipped, the table, JSON.

    Raises ValueError for a device that is not there, settings out of range, or where `out` cannot be written.
    """

    title: str
    device: str
    batch_size: int
    max_skipped: float
    out: Path | None
    seeds: dict[str, int]
    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, list[Metric]] = field(default_factory=dict)
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_metrics()
        self.device = device_of(self.device)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; accepted: 1 or more")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is {self.max_skipped}; accepted: 0 to 1")
        if self.out is not None:
            if self.out.is_dir():
                raise ValueError(f"out is {self.out}, a folder; expected the name of a JSON file")
            check_folder(self.out.parent, "out")

    @contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Watch]:
        """A progress bar over `steps` pictures."""
        with progress_watcher() as watcher:
            step = watcher(title, steps)

            def watch(count: int) -> None:
                for _ in range(count):
                    step({})

            yield watch

    def skip(self, model: str, data: str, skipped: Skipped) -> None:
        """Say what was skipped, once for all models."""
        if skipped and data not in self.left_out:
            self.left_out[data] = {"total": skipped.total, "files": dict(skipped.files)}
            line = escape(f"{data}: {skipped.summary()}")
            Console(stderr=True).print(line, highlight=False, soft_wrap=True)

    def add(self, model: str, data: str, values: dict[Metric, float]) -> None:
        """Measures of a model on a data set."""
        known = self.metrics.setdefault(data, [])
        known += [metric for metric in values if metric not in known]
        self.detail(model, data, {metric.key: value for metric, value in values.items()})

    def detail(self, model: str, data: str, values: dict[str, Any]) -> None:
        """What goes into JSON alone."""
        self.measured.setdefault(model, {}).setdefault(data, {}).update(values)

    def table(self) -> SummaryTable:
        """Models as rows; as columns the measures of each data set."""
        one = len(self.metrics) == 1
        columns = {
            (data, metric.key): replace(
                metric, key=f"{data}/{metric.key}", label=metric.label if one else f"{data} {metric.label}"
            )
            for data, metrics in self.metrics.items()
            for metric in metrics
            if not metric.key.endswith(NOT_PRINTED)
        }
        title = f"{self.title} on {', '.join(self.metrics)}"
        table = SummaryTable(title, list(columns.values()))
        for model, found in self.measured.items():
            table.add(model, {metric.key: found[data][key] for (data, key), metric in columns.items()})
        return table

    def finish(self) -> None:
        """Print the table, and write JSON if wanted. Raises OSError."""
        table = self.table()
        console.print(table.to_rich())
        if self.out is None:
            return
        record = {
            **describe(),
            "torchmetrics": metadata.version("torchmetrics"),
            "device": self.device,
            "seeds": self.seeds,
            "results": self.measured,
            "skipped": self.left_out,
            "table": json.loads(table.to_json()),
        }
        write_atomically(self.out, json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {self.out}", soft_wrap=True)
