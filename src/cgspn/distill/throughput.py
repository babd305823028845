"""The throughput of a stage, and its time waiting for data."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..data import Batch

RECENT = 20  # number of steps over which the displayed rates are averaged
POINTS = 200  # most points of a stage's curve
WARM = 10  # first steps, which compile, tune and allocate; left out of the rates of longer stages
NEW = 2  # first steps of each batch shape, likewise

Size = tuple[int, ...]  # (height, width) of images in pixels


class Work(NamedTuple):
    """The work per image. tokens: of the grid. flops: of teacher and student. None if unknown."""

    tokens: int | None = None
    flops: int | None = None


@dataclass
class Throughput:
    """Seconds of each step since the start or resume of a stage, with the number and size of its images.

    waits: seconds of waiting for data, including the start of workers. steps: seconds of whole steps, including the
    wait. A step ends when the device is idle, so waiting for data is idle time of the device. work: gives the work per
    image of a size, called once per size. peak: FLOP/s of the device; None if unknown.
    """

    waits: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    work: Callable[[Size], Work] = lambda size: Work()
    peak: float | None = None
    known: dict[Size, Work] = field(default_factory=dict)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and record times."""
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
            finally:  # also records the last step
                self.steps.append(time.perf_counter() - asked)

    def rates(self, steps: Iterable[int]) -> dict[str, float]:
        """Images/s of this process, fraction of the time spent waiting for data, and, if known, tokens/s and MFU: the
        FLOPs of teacher and student as a fraction of the device's peak. Empty without steps."""
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
        """The sum over all images of some steps; None if a value is unknown."""
        each = [(self.images[i], getattr(self.known[self.sizes[i]], of)) for i in steps]
        known = [images * value for images, value in each if value is not None]
        return sum(known) if len(known) == len(each) else None

    def settled(self) -> list[int]:
        """The steps after warm-up (the first ten, and the first two of each size), or all if there are none."""
        seen: Counter[Size] = Counter()
        steps = []
        for i, size in enumerate(self.sizes[: len(self.steps)]):
            seen[size] += 1
            if i >= WARM and seen[size] > NEW:
                steps.append(i)
        return steps or list(range(len(self.steps)))

    def recent(self) -> dict[str, float]:
        """The rates of the last steps; empty after the first step."""
        return self.rates(range(max(0, len(self.steps) - RECENT), len(self.steps)))

    def summary(self) -> dict[str, Any]:
        """For the record: `rates` of the `settled` steps, total seconds, seconds until the first batch, and "curve":
        images/s over the stage, with at most 200 points."""
        if not self.steps:
            return {}
        size = max(-(-len(self.steps) // POINTS), len(set(self.sizes)))  # each point covers every size
        runs = [range(i, min(i + size, len(self.steps))) for i in range(0, len(self.steps), size)]
        return {
            **self.rates(self.settled()),
            "seconds": sum(self.steps),
            "first_batch_seconds": self.waits[0],
            "curve": [self.rates(run)["images_per_second"] for run in runs],
        }
