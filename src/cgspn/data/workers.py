"""Training batches read by worker processes. A batch depends only on the source, the settings and its step, so the
number of workers or processes and restarts do not change the data of a run."""

import io
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..terminal import warn
from .captions import TEMPLATES, fill
from .decode import Box, middle, read_box
from .loader import BatchShape, generator_of, mixed_number, scheduled, stream_indices
from .samples import Sample, SampleSource
from .transforms import SCALE, boxes_from, ratio_around

FLIP = 0.5
SUBSTITUTES = 20  # consecutive unreadable images that end a run, whatever the limit
MOST_WORKERS = 16
# most images that a worker reads at once; with a thousand small images, other workers had to wait
PART_IMAGES, PART_PIXELS = 32, 1 << 21
AUGMENT, SUBSTITUTE = 1, 3  # uses of random numbers, see `generator_of`

Failure = tuple[int, str, str]
"""Number, name and reason of a sample that could not be used."""
Key = tuple[int, slice, list[int]]
"""A step, rows of its batch, and the numbers of their samples."""


class WorkerError(OSError):
    """Raised if worker processes die repeatedly; the message suggests what to do."""


@dataclass(frozen=True)
class LoaderConfig:
    """How image files are read. These settings do not change the data of a run.

    Args:
        workers: number of reader processes per training process. None uses one per core, at most 16; 0 reads in the
            training process.
        prefetch: number of parts of a batch, of up to 32 images each, that every worker reads ahead.
        max_skipped: largest tolerated fraction of unreadable images, or of missing or damaged shards, 0 to 1.
        cache: folder for downloaded shards and for indices; None for $XDG_CACHE_HOME/cgspn/data or ~/.cache/cgspn/data.
    """

    workers: int | None = None
    prefetch: int = 4
    max_skipped: float = 0.1
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; accepted: 0 or more, or None")
        if self.prefetch < 1:
            raise ValueError(f"prefetch is {self.prefetch}; accepted: 1 or more")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is {self.max_skipped}; accepted: 0 to 1")

    def workers_for(self, processes: int) -> int:
        """Return the number of workers per training process if `processes` of them share the machine."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(MOST_WORKERS, cores // processes))


@dataclass(frozen=True)
class BatchPlan:
    """Everything that determines the batches of a stage, apart from the source.

    Attributes:
        rows: first and end row that this process reads of a batch of `batch_size` images of `size`, (height, width) in
            pixels; of other shapes it reads the same fraction.
        augment: random crop and flip of each image, instead of a centre crop.
        scale: smallest and largest area of a random crop, as fractions of the image area.
        captioned: skip images without a caption or class.
        shapes: shapes of the batches (`scheduled`); empty if every batch has `batch_size` images of `size`.
    """

    batch_size: int
    rows: tuple[int, int]
    size: tuple[int, int]
    seed: int
    augment: bool = True
    scale: tuple[float, float] = SCALE
    captioned: bool = False
    shapes: tuple[BatchShape, ...] = ()

    def at(self, step: int) -> tuple[BatchShape, int, slice]:
        """Return the shape of a batch, its position in the sequence of epochs, and the rows that this process reads."""
        shape, begin = scheduled(self.shapes or (BatchShape(self.size, self.batch_size),), self.seed, step)
        first, end = (row * shape.images // self.batch_size for row in self.rows)
        return shape, begin, slice(first, end)

    def parts(self, step: int) -> list[slice]:
        """Return the rows that this process reads in a step, divided between its workers."""
        shape, _, rows = self.at(step)
        count = max(1, min(PART_IMAGES, PART_PIXELS // (shape.size[0] * shape.size[1])))
        return [slice(first, min(first + count, rows.stop)) for first in range(rows.start, rows.stop, count)]


class Rows(NamedTuple):
    """Rows of a batch: images uint8 [b, h, w, 3] (None if all failed), indices int64 [b], labels int64 [b] (-1 for an
    image with a caption of its own, or without a class), captions and failures."""

    images: Tensor | None
    indices: Tensor
    labels: Tensor
    captions: list[str]
    failures: list[Failure]


class RowsReader(Dataset[Rows]):
    """The dataset of worker processes: maps (step, rows of its batch, sample numbers) to decoded rows."""

    def __init__(self, source: SampleSource, plan: BatchPlan) -> None:
        self.source, self.plan = source, plan

    def __getitem__(self, key: Key) -> Rows:
        """The rows of one step. Damaged images become failures, because an exception would end the stream of
        batches."""
        step, rows, numbers = key
        shape = self.plan.at(step)[0]
        generator = generator_of(self.plan.seed, AUGMENT, step)
        # drawn for the whole batch, so that a row does not depend on the worker
        draws = torch.rand(shape.images, 6, generator=generator, dtype=torch.float64)[rows]
        images = torch.empty(len(numbers), *shape.size, 3, dtype=torch.uint8)
        found, labels, captions, failures = list(numbers), list[int](), list[str](), list[Failure]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd files
            for row, number in enumerate(numbers):
                for attempt in range(SUBSTITUTES):
                    try:
                        sample, caption = self.place(images[row], found[row], draws[row])
                        break
                    # Decoders raise all kinds of errors on damaged files: OSError, SyntaxError, struct.error, ...
                    except Exception as error:
                        reason = f"{type(error).__name__}: {error}"
                        failures.append((found[row], self.source.name(found[row]), reason))
                        # take a random substitute, since neighbours of a damaged sample may be damaged too
                        found[row] = mixed_number(attempt, SUBSTITUTE, number) % len(self.source)
                else:
                    return Rows(None, torch.tensor(found), torch.tensor(labels), captions, failures)
                labels.append(-1 if sample.caption else sample.label)
                captions.append(caption)
        return Rows(images, torch.tensor(found), torch.tensor(labels), captions, failures)

    def place(self, row: Tensor, number: int, draw: Tensor) -> tuple[Sample, str]:
        """Decode a sample into `row`, uint8 [h, w, 3], and return it with its caption. Raises the decoder's errors."""
        plan, sample = self.plan, self.source.read(number)
        caption = sample.caption
        if not caption and sample.class_name:
            caption = fill(TEMPLATES[int(draw[5] * len(TEMPLATES))], sample.class_name)
        if plan.captioned and not caption:
            raise ValueError('no caption (looked for .txt, and .json with "caption" or "text")')
        size = (row.shape[0], row.shape[1])

        def box(height: int, width: int) -> Box:
            found = boxes_from(draw[:4, None], height, width, plan.scale, ratio_around(size))
            top, left, box_height, box_width = found[0].tolist()
            return top, left, box_height, box_width

        pixels = read_box(io.BytesIO(sample.encoded), size, box if plan.augment else middle(size))
        row.copy_(torch.from_numpy(pixels))
        if plan.augment and draw[4] < FLIP:
            row.copy_(row.flip(1))
        return sample, caption


def _keys(size: int, plan: BatchPlan, start: int, end: int) -> Iterator[Key]:
    """The keys for `RowsReader` in order. They are created in the training process, which knows the order of images."""
    for step in range(start, end):
        shape, begin, _ = plan.at(step)
        whole = stream_indices(size, begin, shape.images, seed=plan.seed)
        for rows in plan.parts(step):
            yield step, rows, whole[rows].tolist()


def joined(parts: list[Rows], device: torch.device) -> Rows:
    """Concatenate parts of a batch, with images on a device."""
    images = [part.images.to(device, non_blocking=True) for part in parts if part.images is not None]
    return Rows(
        torch.cat(images) if len(images) == len(parts) else None,
        torch.cat([part.indices for part in parts]),
        torch.cat([part.labels for part in parts]),
        [caption for part in parts for caption in part.captions],
        [failure for part in parts for failure in part.failures],
    )


def read_rows(
    source: SampleSource, plan: BatchPlan, start: int, end: int, *, workers: int, prefetch: int, device: torch.device
) -> Iterator[tuple[int, Rows]]:
    """Yield the rows of steps `start` to `end` - 1 that this process reads, with prefetching.

    prefetch: parts of batches that each worker reads ahead. device: for the images; transfers to a GPU use pinned
    memory. Raises WorkerError if a restarted worker dies again before it delivers a batch.
    """
    step, restarted_at = start, -1
    while step < end:
        used = min(workers, sum(len(plan.parts(ahead)) for ahead in range(step, min(end, step + workers))))
        pin = device.type == "cuda"
        parts = _started(RowsReader(source, plan), _keys(len(source), plan, step, end), used, prefetch, pin)
        while step < end:
            try:
                rows = joined([next(parts) for _ in plan.parts(step)], device)
            # dead workers raise RuntimeError, or a connection error during a transfer
            except (RuntimeError, OSError, EOFError) as error:
                if not used:
                    raise
                del parts
                if restarted_at == step:
                    raise WorkerError(
                        f"a reader process died twice at step {step} ({error}); if memory ran out, fewer "
                        "workers or a smaller prefetch need less"
                    ) from error
                warn(f"a reader process died ({error}); restarted at step {step}, no data is lost")
                restarted_at = step
                break
            yield step, rows
            step += 1


def _started(reader: RowsReader, keys: Iterator[Key], workers: int, prefetch: int, pin: bool) -> Iterator[Rows]:
    """Start a loader's workers, and restore the process's signal handler.

    The loader's handler would raise anywhere in the process when a worker dies, even in an optimiser step.
    """
    ours = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if ours else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # the user asked for more than cores
            loader = DataLoader(
                reader,
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                pin_memory=pin,
                generator=torch.Generator(),  # otherwise the start would use the global generator
            )
            return iter(loader)
    finally:
        if ours:
            signal.signal(signal.SIGCHLD, before)
