"""The shape of each batch with mixed sizes, and its position in the sequence of epochs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .loader import generator_of

SHAPES = 5  # use of random numbers, see `generator_of`


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
    order = torch.randperm(len(shapes), generator=generator_of(seed, SHAPES, turn)).tolist()
    earlier = turn * sum(shape.images for shape in shapes) + sum(shapes[i].images for i in order[:place])
    return shapes[order[place]], earlier
