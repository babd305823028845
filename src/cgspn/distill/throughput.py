"""How fast a stage ran, and how long it waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..data import Batch

RECENT = 20  # steps that what is shown of a running stage is the mean of
POINTS = 200  # of the curve of a stage
WARM = 10  # steps that compile, tune and allocate: in a stage of more, they are left out of the figures


@dataclass
class Throughput:
    """Seconds of each step since the stage was started, or started again.

    Attributes:
        waits: for data; the first one, which starts the workers, included.
        steps: of the whole step, its wait included. A step ends with the wait for the device, so that waiting for data
            is time in which the device has nothing to do.
        images: of one step, on this process.
        flops: FLOP an image, and peak: FLOP/s of the device; None if not known.
    """

    waits: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    images: int = 0
    flops: int | None = None
    peak: float | None = None

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

    def rates(self, steps: slice) -> dict[str, float]:
        """Images a second on this process, share of the time that data was waited for (0 to 1), and, if known, MFU:
        the share of the device's peak (0 to 1) that the FLOP of teacher and student make. Empty for no steps."""
        seconds, count = sum(self.steps[steps]), len(self.steps[steps])
        if not count:
            return {}
        rate = self.images * count / seconds
        rates = {"images_per_second": rate, "data_wait_share": sum(self.waits[steps]) / seconds}
        if self.flops and self.peak:
            rates["mfu"] = rate * self.flops / self.peak
        return rates

    def recent(self) -> dict[str, float]:
        """The rates of the last steps; empty after the first."""
        return self.rates(slice(max(0, len(self.steps) - RECENT), len(self.steps)))

    def summary(self) -> dict[str, Any]:
        """What a record keeps: `rates`, without the first ten steps if there are more, seconds until the first batch,
        and "curve": images a second in the course of the stage, means over equal runs of at most 200."""
        if not self.steps:
            return {}
        size = -(-len(self.steps) // POINTS)
        runs = [slice(i, i + size) for i in range(0, len(self.steps), size)]
        return {
            **self.rates(slice(WARM if len(self.steps) > WARM else 0, len(self.steps))),
            "first_batch_seconds": self.waits[0],
            "curve": [self.rates(run)["images_per_second"] for run in runs],
        }
