"""The console, progress bars and progress lines."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from .terminal import PlainConsole

if TYPE_CHECKING:
    from .distill.stages import Watcher
    from .distill.trainer import Watch

console = PlainConsole()
EVERY = 30.0  # seconds between progress lines without a terminal


def writable_folder(path: Path, name: str) -> Path:
    """Create the folder and check that it is writable, before the long work starts. Raises ValueError naming `name`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{name} is {path}, which is not writable: {error.strerror}") from error
    return path


def speed_of(record: dict[str, float]) -> str:
    """Images/s, and model FLOPs utilisation if the device's peak is known; "" without a measurement."""
    if "images_per_second" not in record:
        return ""
    mfu = f", MFU {record['mfu']:.0%}" if "mfu" in record else ""
    return rate_text(record["images_per_second"]) + mfu


def rate_text(rate: float) -> str:
    """Images/s as text, with decimals for small rates."""
    return f"{rate:,.{0 if rate >= 10 else 2}f} images/s"


def duration_text(seconds: float) -> str:
    """A duration in hours, minutes or seconds: the largest unit of which it has at least one."""
    for unit, length in (("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= length:
            return f"{seconds / length:,.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "less than 0.1 s"


def waiting(text: str) -> Status:
    """Show a status message until the context ends."""
    return console.status(Text(text))


@contextmanager
def progress_watcher() -> Iterator[Watcher]:
    """A `Watcher` that shows each training stage as a progress bar with loss and speed. Full bars stay visible.

    Without a terminal, as in a log file, it prints a line now and then.
    """
    if not console.is_terminal:
        yield plain_watcher
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:

        def watcher(title: str, steps: int) -> Watch:
            bar = progress.add_task(title, total=steps, loss="", speed="")

            def watch(record: dict[str, float]) -> None:
                if "step" in record:  # a training step; the run may have resumed from a snapshot
                    loss = f"{record['total']:.4f}"
                    progress.update(bar, completed=record["step"] + 1, loss=loss, speed=speed_of(record))
                else:
                    progress.advance(bar)

            return watch

        yield watcher


def plain_watcher(title: str, steps: int) -> Watch:
    """A `Watcher` that prints a line after the first and last step, and at most every `EVERY` seconds between them."""
    began = time.monotonic()
    said, done = -EVERY, 0

    def watch(record: dict[str, float]) -> None:
        nonlocal said, done
        first = done == 0
        done = int(record["step"]) + 1 if "step" in record else done + 1
        passed = time.monotonic() - began
        if not first and done < steps and passed - said < EVERY:
            return
        said = passed
        loss = f"loss {record['total']:.4f}" if "total" in record else ""
        parts = (f"{title}: {done}/{steps}", loss, speed_of(record), duration_text(passed))
        console.print(", ".join(part for part in parts if part), soft_wrap=True)

    return watch
