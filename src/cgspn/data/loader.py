"""Batches that depend only on the seed and the step, so that a run resumes exactly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""From images uint8 [B, 1 or 3, H, W] and a source of randomness to what the encoder takes, float [B, 3, h, w]."""


class ImageSource(Protocol):
    """Protocol for the source of `batches`: a length and random access. `ImageSet` implements it."""

    def __len__(self) -> int:
        """Number of images."""

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 1 or 3, H, W] and labels int64 [B] at `indices`, int64 [B]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: its step, images and their int64 [B] indices in the source and labels (-1 for none).

    images: output of the transform, or uint8 [B, 1 or 3, H, W] without one. captions: one per image, or empty.
    """

    step: int
    indices: Tensor
    images: Tensor
    labels: Tensor
    captions: tuple[str, ...] = ()


def mixed_number(seed: int, purpose: int, number: int) -> int:
    """A 64-bit hash, so that the random streams of consecutive seeds do not overlap between purposes or numbers."""
    mixed = seed & 0xFFFFFFFFFFFFFFFF
    for value in (purpose, number):
        mixed = (mixed ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def generator_of(seed: int, purpose: int, number: int) -> torch.Generator:
    """A CPU random generator for one purpose at one step or epoch.

    Purposes: 0 order, 1 crops, 2 colours, 3 blends, 4 boxes, 5 shapes of batches.
    """
    return torch.Generator().manual_seed(mixed_number(seed, purpose, number))


@lru_cache(maxsize=2)  # consecutive batches use the same permutation
def _order(size: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    return torch.randperm(size, generator=generator_of(seed, 0, epoch)) if shuffle else torch.arange(size)


def batch_indices(size: int, batch_size: int, step: int, *, seed: int = 0, shuffle: bool = True) -> Tensor:
    """Return the indices of the images in batch `step`, from an infinite sequence of epochs, each a permutation of all
    images.

    Every batch is full. A batch at the end of an epoch is completed with images of the next epoch. `batch_size` may
    exceed `size`, the number of images in the source. shuffle: False repeats the order of the source.

    Returns int64 [batch_size]. Raises ValueError for a size, batch size or step out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; must be at least 1")
    if step < 0:
        raise ValueError(f"step is {step}; must be at least 0")
    return stream_indices(size, step * batch_size, batch_size, seed=seed, shuffle=shuffle)


def stream_indices(size: int, begin: int, count: int, *, seed: int = 0, shuffle: bool = True) -> Tensor:
    """Indices of `count` images from position `begin` of an infinite sequence of epochs of `size` images, int64
    [count].

    Raises ValueError for a source without images.
    """
    if size < 1:
        raise ValueError(f"size is {size}; the source must hold at least 1 image")
    end = begin + count
    parts = []
    for epoch in range(begin // size, (end - 1) // size + 1):
        first = epoch * size
        parts.append(_order(size, seed, epoch, shuffle)[max(begin - first, 0) : end - first])
    return torch.cat(parts)


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    steps: int,
    start: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """Yield batches `start` to `steps` - 1 of the sequence given by `batch_indices`.

    To resume after step s, pass start = s + 1 and the same seed; order and augmentation then continue exactly.
    `transform` is called as transform(images, generator), where the generator depends only on seed and step. Raises the
    ValueError of `batch_indices` at the first batch.
    """
    for step in range(start, steps):
        indices = batch_indices(len(source), batch_size, step, seed=seed, shuffle=shuffle)
        yield fetch(source, step, indices, transform, seed)


def one_pass(
    source: ImageSource, batch_size: int, *, seed: int = 0, transform: Transform | None = None
) -> Iterator[Batch]:
    """Yield every image once, in order, for evaluation. The last batch may be smaller.

    Raises ValueError for a batch below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; must be at least 1")
    for step, indices in enumerate(torch.split(torch.arange(len(source)), batch_size) if len(source) else ()):
        yield fetch(source, step, indices, transform, seed)


def fetch(source: ImageSource, step: int, indices: Tensor, transform: Transform | None, seed: int) -> Batch:
    """The batch of the given images. The random numbers of its transform depend only on seed and step."""
    images, labels = source.fetch(indices)
    if transform is not None:
        images = transform(images, generator_of(seed, 1, step))
    return Batch(step, indices, images, labels)
