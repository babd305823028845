"""Where a run's batches come from, each process taking its share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ..data import Batch, EvalTransform, ImageSet, TrainTransform, batches
from ..models.config import EncoderConfig
from .config import OptimConfig
from .parallel import World
from .trainer import Stream, rows_of


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
    return EvalTransform(size or config.image_size, mean=config.image_mean, std=config.image_std)


@dataclass(frozen=True)
class ImageSetFeed:
    """Images that are in memory; captions are templates filled with class names."""

    images: ImageSet

    def stream(self, encoder: EncoderConfig, size: tuple[int, int], optim: OptimConfig, world: World) -> Stream:
        """As in `Feed`. Raises ValueError if the batch does not divide by the number of processes."""
        share = share_of(optim.batch_size, world)
        transform = train_transform(encoder, size) if optim.augment else eval_transform(encoder, size)

        def start_at(start: int) -> Iterator[Batch]:
            whole: Iterable[Batch] = batches(
                self.images, optim.batch_size, steps=optim.steps, start=start, seed=optim.seed, transform=transform
            )
            for batch in whole:
                own = rows_of(batch, share) if world.size > 1 else batch
                yield replace(own, images=own.images.to(world.device), labels=own.labels.to(world.device))

        return start_at

    def captions(self, batch: Batch) -> list[str]:
        """As in `Feed`; which template changes from step to step."""
        return self.images.captions(seed=batch.step, indices=batch.indices)


def share_of(batch_size: int, world: World) -> slice:
    """Which rows of a batch are this process's. Raises ValueError for a batch that does not divide."""
    if batch_size % world.size:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the {world.size} processes")
    share = batch_size // world.size
    return slice(world.rank * share, (world.rank + 1) * share)
