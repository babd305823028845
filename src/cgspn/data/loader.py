"""The images and shape of each batch. They depend only on the seed and the step, so that a run resumes exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: its step, images, and int64 [B] indices in the source and labels.

    images: normalised, float [B, channels, H, W]. labels: -1 for an image without a class or with a caption of its own.
    captions: one per image, or empty.
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
def _order(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_of(seed, 0, epoch))


def stream_indices(size: int, begin: int, count: int, *, seed: int = 0) -> Tensor:
    """Indices of `count` images from position `begin` of an infinite sequence of epochs of `size` images, int64
    [count].

    Each epoch is a permutation of all images. Raises ValueError for a source without images.
    """
    if size < 1:
        raise ValueError(f"size is {size}; the source must hold at least 1 image")
    end = begin + count
    parts = []
    for epoch in range(begin // size, (end - 1) // size + 1):
        first = epoch * size
        parts.append(_order(size, seed, epoch)[max(begin - first, 0) : end - first])
    return torch.cat(parts)


class BatchShape(NamedTuple):
    """Shape of a batch. size: (height, width) in pixels. images: number of images."""

    size: tuple[int, int]
    images: int


def scheduled(shapes: Sequence[BatchShape], seed: int, step: int) -> tuple[BatchShape, int]:
    """Return the shape of batch `step`, and the number of images in all previous batches.

    The shapes are visited in random order, and each is used once before any is repeated. All shapes are therefore
    equally frequent in a stage of any length, and the position of a step is computed without a sum over earlier steps.
    """
    turn, place = divmod(step, len(shapes))
    order = torch.randperm(len(shapes), generator=generator_of(seed, 5, turn)).tolist()
    earlier = turn * sum(shape.images for shape in shapes) + sum(shapes[i].images for i in order[:place])
    return shapes[order[place]], earlier
