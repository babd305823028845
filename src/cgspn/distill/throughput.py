"""How fast a stage ran, and how long it waited for data."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..data import Batch

RECENT = 20  # steps that what is shown of a running stage is the mean of
POINTS = 200  # of the curve of a stage
WARM = 10  # steps that compile, tune and allocate: in a stage of more, they are left out of the figures
NEW = 2  # steps of each shape of batches that do so too

Size = tuple[int, ...]  # (height, width) of images in pixels


class Work(NamedTuple):
    """Of one image. tokens: of the grid. flops: FLOP of teacher and student. None for what is not known."""

    tokens: int | None = None
    flops: int | None = None


@dataclass
class Throughput:
    """Seconds of each step since the stage was started, or started again, with the number and size of its images.

    waits: for data; the first one, which starts the workers, included. steps: of the whole step, its wait included. A
    step ends with the wait for the device, so that waiting for data is time in which the device has nothing to do.
    work: what an image of a size is; asked once for each. peak: FLOP/s of the device; None if not known.
    """

    waits: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    work: Callable[[Size], Work] = lambda size: Work()
    peak: float | None = None
    known: dict[Size, Work] = field(default_factory=dict)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and measure."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.waits.append(time.perf_counter() - asked)
            size = tuple(batch.images.shape[-2:])
            self.images.append(len(batch.indices))
            self.sizes.append(size)
            if size not in self.known:
                self.known[size] = self.work(size)
            try:
                yield batch
            finally:  # of the last step too, after which nothing more is asked for
                self.steps.append(time.perf_counter() - asked)

    def rates(self, steps: Iterable[int]) -> dict[str, float]:
        """Images/s on this process, share of the time that data was waited for (0 to 1), and, if known, tokens a
        second and MFU: the share of the device's peak (0 to 1) that the FLOP of teacher and student make. Empty for no
        steps."""
        chosen = list(steps)
        seconds = sum(self.steps[i] for i in chosen)
        if not chosen:
            return {}
        rates = {"images_per_second": sum(self.images[i] for i in chosen) / seconds}
        rates["data_wait_share"] = sum(self.waits[i] for i in chosen) / seconds
        tokens, flops = self._total(chosen, "tokens"), self._total(chosen, "flops")
        if tokens is not None:
            rates["tokens_per_second"] = tokens / seconds
        if flops is not None and self.peak:
            rates["mfu"] = flops / seconds / self.peak
        return rates

    def _total(self, steps: list[int], of: Literal["tokens", "flops"]) -> int | None:
        """The sum over the images of some steps; None if it is not known of all."""
        each = [(self.images[i], getattr(self.known[self.sizes[i]], of)) for i in steps]
        known = [images * value for images, value in each if value is not None]
        return sum(known) if len(known) == len(each) else None

    def settled(self) -> list[int]:
        """The steps that compile, tune and allocate nothing: after the first ten, and the first two of each size. All
        if there are no others."""
        seen: Counter[Size] = Counter()
        steps = []
        for i, size in enumerate(self.sizes[: len(self.steps)]):
            seen[size] += 1
            if i >= WARM and seen[size] > NEW:
                steps.append(i)
        return steps or list(range(len(self.steps)))

    def recent(self) -> dict[str, float]:
        """The rates of the last steps; empty after the first."""
        return self.rates(range(max(0, len(self.steps) - RECENT), len(self.steps)))

    def summary(self) -> dict[str, Any]:
        """What a record keeps: `rates` of the `settled` steps, seconds in all and until the first batch, and "curve":
        images/s in the course of the stage, means over equal runs of at most 200."""
        if not self.steps:
            return {}
        size = max(-(-len(self.steps) // POINTS), len(set(self.sizes)))  # every size in each of the runs
        runs = [range(i, min(i + size, len(self.steps))) for i in range(0, len(self.steps), size)]
        return {
            **self.rates(self.settled()),
            "seconds": sum(self.steps),
            "first_batch_seconds": self.waits[0],
            "curve": [self.rates(run)["images_per_second"] for run in runs],
        }
