"""Which shape each batch of a run has, and which images of the endless stream of epochs are in it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .loader import generator_of

SHAPES = 5  # purpose of randomness, see `generator_of`


class BatchShape(NamedTuple):
    """What a batch may look like. size: (height, width) in pixels. images: their number."""

    size: tuple[int, int]
    images: int


def scheduled(shapes: Sequence[BatchShape], seed: int, step: int) -> tuple[BatchShape, int]:
    """The shape of batch `step`, and the number of images in all batches before it.

    Every run of as many steps as there are shapes has each shape once, in an order drawn anew. So all shapes are
    equally frequent in a stage of any length, and the position of a step needs no sum over the steps before it.
    """
    turn, place = divmod(step, len(shapes))
    order = torch.randperm(len(shapes), generator=generator_of(seed, SHAPES, turn)).tolist()
    earlier = turn * sum(shape.images for shape in shapes) + sum(shapes[i].images for i in order[:place])
    return shapes[order[place]], earlier
