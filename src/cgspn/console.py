"""What people see while they wait: one console, one kind of progress bar."""

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
EVERY = 30.0  # seconds between lines of progress, where there is no terminal


def writable_folder(path: Path, name: str) -> Path:
    """Make the folder and write in it, before the long work starts. Raises ValueError naming the argument `name`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{name} is {path}, where nothing can be written: {error.strerror}") from error
    return path


def speed_of(record: dict[str, float]) -> str:
    """Images/s, and model FLOPs utilisation where the device's peak is known; "" where nothing is measured."""
    if "images_per_second" not in record:
        return ""
    mfu = f", MFU {record['mfu']:.0%}" if "mfu" in record else ""
    return rate_text(record["images_per_second"]) + mfu


def rate_text(rate: float) -> str:
    """Images/s in words, with decimals where there are few."""
    return f"{rate:,.{0 if rate >= 10 else 2}f} images/s"


def waiting(text: str) -> Status:
    """Show what is being done until the context ends."""
    return console.status(Text(text))


@contextmanager
def progress_watcher() -> Iterator[Watcher]:
    """A `Watcher` that shows each training stage as a progress bar with its loss and speed; bars stay when full.

    Where there is no terminal, as in a log file, a line now and then.
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
                if "step" in record:  # of a training, which may have gone on from a snapshot
                    loss = f"{record['total']:.4f}"
                    progress.update(bar, completed=record["step"] + 1, loss=loss, speed=speed_of(record))
                else:
                    progress.advance(bar)

            return watch

        yield watcher


def plain_watcher(title: str, steps: int) -> Watch:
    """Prints a line after the first and the last step, and at most every `EVERY` seconds between them."""
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
        parts = (f"{title}: {done}/{steps}", loss, speed_of(record), f"{passed:.0f} s")
        console.print(", ".join(part for part in parts if part), soft_wrap=True)

    return watch
