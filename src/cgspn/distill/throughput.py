"""How fast a stage ran, and how long it waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..data import Batch

WARM = 10  # steps that compile, tune and allocate: in a stage of more, they are left out of the figures


@dataclass
class Throughput:
    """Seconds of each step since the stage was started, or started again.

    Attributes:
        waits: for data; the first one, which starts the workers, included.
        steps: of the whole step, its wait included. A step ends with the wait for the device, so that waiting for data
            is time in which the device has nothing to do.
        images: of one step, on this process.
    """

    waits: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    images: int = 0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and measure."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.images = len(batch.indices)
            self.waits.append(time.perf_counter() - asked)
            try:
                yield batch
            finally:  # of the last step too, after which nothing more is asked for
                self.steps.append(time.perf_counter() - asked)

    def summary(self) -> dict[str, float]:
        """What a record keeps: images a second on this process, share of the time that data was waited for (0 to 1),
        both without the first ten steps if there are more, and seconds until the first batch."""
        if not self.steps:
            return {}
        measured = slice(WARM if len(self.steps) > WARM else 0, len(self.steps))
        seconds = sum(self.steps[measured])
        return {
            "images_per_second": self.images * len(self.steps[measured]) / seconds,
            "data_wait_share": sum(self.waits[measured]) / seconds,
            "first_batch_seconds": self.waits[0],
        }
