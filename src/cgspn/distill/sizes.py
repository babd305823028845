"""Training at mixed sizes: the shapes that batches are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRange:
    """Sizes and aspect ratios of batches, one of them drawn for each batch.

    A student that sees one size loses its features at others: it learns sums over the lines of that grid. The default
    range spans a factor of four in length, two octaves around the usual 224 px: trained from 112 to 448 px, the cosine
    to the teacher fell by 0.02 from 224 to 756 px, where it fell by 0.26 for a student of 224 px alone. Others draw
    from similar ranges: C-RADIOv4 from 128 to 432 px (and 512 to 1152 px); DINOv3 ends its training with mixed sizes.

    Args:
        smallest: side of the smallest square, in pixels.
        largest: side of the largest square, in pixels.
        count: how many sizes, evenly spaced in log scale from the smallest to the largest and rounded to whole patches.
        aspects: width / height; a shape has the area of its square.
    """

    smallest: int = 112
    largest: int = 448
    count: int = 6
    aspects: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Raise ValueError for an empty range."""
        if not 0 < self.smallest <= self.largest:
            raise ValueError(f"smallest is {self.smallest}; accepted: 1 to largest, {self.largest} pixels")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; accepted: 1 or more")
        if not self.aspects or not all(0 < aspect < math.inf for aspect in self.aspects):
            raise ValueError(f"aspects is {self.aspects}; accepted: one or more numbers above 0, width / height")

    def sides(self, patch: int) -> tuple[int, ...]:
        """Sides of the squares in pixels, whole patches, ascending and each once."""
        ratio = (self.largest / self.smallest) ** (1 / max(1, self.count - 1))
        return tuple(sorted({whole(self.smallest * ratio**i, patch) for i in range(self.count)}))

    def shapes(self, patch: int) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels, whole patches, each once: every side with every aspect."""
        return tuple(
            dict.fromkeys(
                (whole(side / aspect**0.5, patch), whole(side * aspect**0.5, patch))
                for side in self.sides(patch)
                for aspect in self.aspects
            )
        )


def whole(pixels: float, patch: int) -> int:
    """The nearest multiple of the patch, at least one patch."""
    return max(1, round(pixels / patch)) * patch


def tokens_of(size: tuple[int, int], patch: int) -> int:
    """Grid tokens of an image of `size` (height, width) pixels."""
    return (size[0] // patch) * (size[1] // patch)
