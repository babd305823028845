"""Where a run's batches come from, each process taking its share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from ..data import (
    Batch,
    BatchPlan,
    EvalTransform,
    ImageSet,
    LoaderConfig,
    SampleSource,
    SkipCounter,
    TrainTransform,
    Transform,
    batches,
    read_rows,
)
from ..data.loader import generator_of
from ..data.transforms import (
    blend,
    blend_factors,
    jitter_colors,
    jitter_factors,
    normalize,
    paste,
    paste_boxes,
    to_float,
)
from ..models.config import EncoderConfig
from .config import OptimConfig
from .parallel import World
from .trainer import Stream, rows_of

COLORS, BLENDS, BOXES = 2, 3, 4  # purposes of randomness, see `generator_of`


class Feed(Protocol):
    """A source of training images for any stage."""

    def stream(self, encoder: EncoderConfig, size: tuple[int, int], optim: OptimConfig, world: World) -> Stream:
        """From a step to this process's share of the batches from there on, on its device.

        encoder: whose normalisation the images get; size: (height, width) in pixels.
        """

    def captions(self, batch: Batch) -> list[str]:
        """One caption for each image of a batch."""


def train_transform(config: EncoderConfig, size: tuple[int, int] | None = None) -> TrainTransform:
    """Random crop and flip to `size`, the encoder's native one if None, normalised as it expects.

    Raises ValueError for a wrong size.
    """
    return TrainTransform(size or config.image_size, mean=config.image_mean, std=config.image_std)


def eval_transform(config: EncoderConfig, size: tuple[int, int] | None = None) -> EvalTransform:
    """Resize and centre crop to `size`, the native one if None, normalised as it expects.

    Raises ValueError for a wrong size.
    """
    return EvalTransform(size or config.image_size, config.image_crop, config.image_mean, config.image_std)


@dataclass(frozen=True)
class ImageSetFeed:
    """Images that are in memory; captions are templates filled with class names."""

    images: ImageSet

    def stream(self, encoder: EncoderConfig, size: tuple[int, int], optim: OptimConfig, world: World) -> Stream:
        """As in `Feed`. Raises ValueError as `blended_share`, and for a wrong size."""
        share = blended_share(optim, world)
        transform: Transform = eval_transform(encoder, size)
        if optim.augment:
            transform = replace(train_transform(encoder, size), scale=optim.crop_scale, jitter=optim.jitter)

        def start_at(start: int) -> Iterator[Batch]:
            whole: Iterable[Batch] = batches(
                self.images, optim.batch_size, steps=optim.steps, start=start, seed=optim.seed, transform=transform
            )
            for batch in whole:
                own = rows_of(batch, share) if world.size > 1 else batch
                images = blended(own.images.to(world.device), optim, batch.step, share)
                yield replace(own, images=images, labels=own.labels.to(world.device))

        return start_at

    def captions(self, batch: Batch) -> list[str]:
        """As in `Feed`; which template changes from step to step."""
        return self.images.captions(seed=batch.step, indices=batch.indices)


@dataclass(frozen=True)
class SampleFeed:
    """Images that are read, decoded and cropped by worker processes while the model trains.

    Attributes:
        source: shards or a folder.
        loader: how they are read.
        captioned: skip images without a caption or class, for a contrastive loss.
        tally: counts what this process reads and skips, over all its streams.
    """

    source: SampleSource
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    captioned: bool = False
    tally: SkipCounter = field(init=False)

    def __post_init__(self) -> None:
        """Begin to count."""
        object.__setattr__(self, "tally", SkipCounter(self.source.source, len(self.source), self.loader.max_skipped))

    def stream(self, encoder: EncoderConfig, size: tuple[int, int], optim: OptimConfig, world: World) -> Stream:
        """As in `Feed`. The stream raises ValueError when too much is skipped, WorkerError when workers keep dying.

        Raises ValueError as `blended_share`, or for an encoder of grey images.
        """
        if encoder.channels != 3:
            raise ValueError(f"the encoder takes {encoder.channels} channels; accepted for files of images: 3")
        share = blended_share(optim, world)
        plan = BatchPlan(
            optim.batch_size,
            (share.start, share.stop),
            size,
            optim.seed,
            augment=optim.augment,
            scale=optim.crop_scale,
            captioned=self.captioned,
        )
        workers, cuda = self.loader.workers_for(world.local_size), world.device.type == "cuda"

        def start_at(start: int) -> Iterator[Batch]:
            read = read_rows(
                self.source, plan, start, optim.steps, workers=workers, prefetch=self.loader.prefetch, pin=cuda
            )
            for step, rows in read:
                self.tally.add(len(rows.labels), rows.failures)
                if rows.images is None:
                    raise ValueError(
                        f"{self.source.source}: {len(rows.failures)} images in a row cannot be used, the last "
                        f"{rows.failures[-1][1]}: {rows.failures[-1][2]}"
                    )
                # bytes travel, and become floats on the device
                pixels = rows.images.to(world.device, non_blocking=cuda).permute(0, 3, 1, 2).contiguous()
                images = to_float(pixels)
                if optim.augment and optim.jitter:
                    factors = jitter_factors(optim.batch_size, optim.jitter, generator_of(optim.seed, COLORS, step))
                    images = jitter_colors(images, factors[share])
                images = normalize(images, encoder.image_mean, encoder.image_std)
                images = blended(images, optim, step, share)
                yield Batch(step, rows.indices, images, rows.labels.to(world.device), tuple(rows.captions))

        return start_at

    def captions(self, batch: Batch) -> list[str]:
        """As in `Feed`: those beside the images, or templates filled with their class names."""
        return list(batch.captions)


def blended(images: Tensor, optim: OptimConfig, step: int, share: slice) -> Tensor:
    """A process's share of a batch after mixup and CutMix, alike on any number of processes with multiples of four."""
    if optim.mixup:
        factors = blend_factors(optim.batch_size, optim.mixup, generator_of(optim.seed, BLENDS, step))
        images = blend(images, factors[share])
    if optim.cutmix:
        random = generator_of(optim.seed, BOXES, step)
        boxes = paste_boxes(optim.batch_size, optim.cutmix, images.shape[2], images.shape[3], random)
        images = paste(images, boxes[share])
    return images


def share_of(batch_size: int, world: World) -> slice:
    """Which rows of a batch are this process's. Raises ValueError for a batch that does not divide."""
    if batch_size % world.size:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the {world.size} processes")
    share = batch_size // world.size
    return slice(world.rank * share, (world.rank + 1) * share)


def blended_share(optim: OptimConfig, world: World) -> slice:
    """`share_of` an optimisation's batches. Raises ValueError also for shares in which no image has another to blend
    with."""
    share = share_of(optim.batch_size, world)
    own = share.stop - share.start
    for name, least in (("mixup", 2), ("cutmix", 3)):  # the second and the third image are the first one's partners
        if getattr(optim, name) and own < least:
            raise ValueError(f"{name} is {getattr(optim, name)}, with {own} images a process; expected {least} or more")
    return share
