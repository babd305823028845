"""The throughput of a stage, and its time waiting for data."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from ..data import Batch

RECENT = 20  # number of steps over which the displayed rates are averaged
POINTS = 200  # most points of a stage's curve
WARM = 10  # first steps, which compile, tune and allocate; left out of the rates of longer stages
NEW = 2  # first steps of each batch shape, likewise

Size = tuple[int, int]  # (height, width) of images in pixels


class Step(NamedTuple):
    """A step: the number and size of its images, their tokens, the FLOPs of teacher and student (None if unknown), the
    seconds of waiting for data, and the seconds in total."""

    images: int
    size: Size
    tokens: int
    flops: int | None
    waited: float
    seconds: float


@dataclass
class Throughput:
    """The steps since the start or resume of a stage.

    The wait includes the start of workers. A step ends when the device is idle, so waiting for data is idle time of the
    device. work: gives the tokens and FLOPs of an image of a size, called once per size. peak: FLOP/s of the device;
    None if unknown.
    """

    work: Callable[[Size], tuple[int, int | None]] = lambda size: (0, None)
    peak: float | None = None
    steps: list[Step] = field(default_factory=list)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and record times."""
        iterator, work = iter(batches), cache(self.work)
        while True:
            asked = time.perf_counter()
            if (batch := next(iterator, None)) is None:
                return
            waited, images = time.perf_counter() - asked, len(batch.indices)
            height, width = batch.images.shape[-2:]
            tokens, flops = work((height, width))
            total = None if flops is None else images * flops
            try:
                yield batch
            finally:  # also records the last step
                seconds = time.perf_counter() - asked
                self.steps.append(Step(images, (height, width), images * tokens, total, waited, seconds))

    def rates(self, steps: list[Step]) -> dict[str, float]:
        """Images/s of this process, fraction of the time spent waiting for data, tokens/s and, if known, MFU: the FLOPs
        of teacher and student as a fraction of the device's peak. Empty without steps."""
        if not steps:
            return {}
        seconds = sum(step.seconds for step in steps)
        flops = [step.flops for step in steps if step.flops is not None]
        return {
            "images_per_second": sum(step.images for step in steps) / seconds,
            "data_wait_share": sum(step.waited for step in steps) / seconds,
            "tokens_per_second": sum(step.tokens for step in steps) / seconds,
            **({"mfu": sum(flops) / seconds / self.peak} if self.peak and len(flops) == len(steps) else {}),
        }

    def settled(self) -> list[Step]:
        """The steps after warm-up (the first ten, and the first two of each size), or all if there are none."""
        seen: Counter[Size] = Counter()
        steps = []
        for i, step in enumerate(self.steps):
            seen[step.size] += 1
            if i >= WARM and seen[step.size] > NEW:
                steps.append(step)
        return steps or self.steps

    def recent(self) -> dict[str, float]:
        """The rates of the last steps; empty after the first step."""
        return self.rates(self.steps[-RECENT:])

    def summary(self) -> dict[str, Any]:
        """For the record: `rates` of the `settled` steps, total seconds, seconds until the first batch, and "curve":
        images/s over the stage, with at most 200 points."""
        if not self.steps:
            return {}
        size = max(-(-len(self.steps) // POINTS), len({step.size for step in self.steps}))  # each covers every size
        runs = [self.steps[i : i + size] for i in range(0, len(self.steps), size)]
        return {
            **self.rates(self.settled()),
            "seconds": sum(step.seconds for step in self.steps),
            "first_batch_seconds": self.steps[0].waited,
            "curve": [self.rates(run)["images_per_second"] for run in runs],
        }


def over_processes(each: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a stage from those of all processes: the sum of images/s, and the longest wait for data."""
    if not all(each):
        return {}
    found = {key: max(one[key] for one in each) for key in each[0]}
    found |= {name: sum(one[name] for one in each) for name in found if name.endswith("per_second")}
    found["curve"] = [sum(rates) for rates in zip(*(one["curve"] for one in each))]
    return found | ({"mfu": sum(one["mfu"] for one in each) / len(each)} if "mfu" in found else {})
