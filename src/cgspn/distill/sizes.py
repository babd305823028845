"""The image shapes of training at mixed sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, get_args, get_origin, get_type_hints

USUAL = 4 ** (1 / 5)  # ratio of consecutive sides if a range has only one side; that of the default range


@dataclass(frozen=True)
class SizeRange:
    """Range of image sizes and aspect ratios; each batch uses one of them.

    A student trained at one size gets worse at other sizes (results/resolution). The range should include the largest
    size that the student will be used at; a batch of large images costs no more than one of small images. At 756 px, a
    student with `value_expansion` had 0.75 of its cosine similarity at 224 px when it was trained only at 224 px, 0.97
    with 112 to 448 px, and 0.99 with the default of 112 to 784 px. C-RADIOv4 uses similar ranges, 128 to 432 px and 512
    to 1152 px, and DINOv3 ends its training with mixed sizes.

    Args:
        smallest: side of the smallest square in pixels.
        largest: side of the largest square in pixels.
        count: number of sizes from smallest to largest, evenly spaced on a log scale and rounded to whole patches.
        aspects: aspect ratios (width / height). A shape has the same area as the square of its size.
        largest_share: fraction of the batches that have the largest size, 0 to 1. None gives every size the same number
            of batches.
    """

    smallest: int = 112
    largest: int = 784
    count: int = 6
    aspects: tuple[float, ...] = (1.0,)
    largest_share: float | None = None

    def __post_init__(self) -> None:
        aspects = bool(self.aspects) and all(0 < aspect < math.inf for aspect in self.aspects)
        check_fields(
            self,
            ("smallest", 0 < self.smallest <= self.largest, f"1 to largest, {self.largest} pixels"),
            ("count", self.count >= 1, "1 or more"),
            ("aspects", aspects, "one or more numbers above 0, width / height"),
            ("largest_share", self.largest_share is None or 0 < self.largest_share <= 1, "above 0 to 1, or None"),
        )

    def sides(self, patch: int) -> tuple[int, ...]:
        """Sides of the squares in pixels, rounded to whole patches, ascending, without duplicates."""
        ratio = (self.largest / self.smallest) ** (1 / max(1, self.count - 1))
        return tuple(sorted({whole(self.smallest * ratio**i, patch) for i in range(self.count)}))

    def shapes(self, patch: int) -> tuple[tuple[int, int], ...]:
        """The shapes (height, width) in pixels, in whole patches: every side with every aspect ratio, ascending.

        Each shape is listed once, except those of the largest side, which are repeated to make up `largest_share`.
        """
        *smaller, largest = self.sides(patch)
        below, top = self._with_aspects(smaller, patch), self._with_aspects([largest], patch)
        if self.largest_share is None:
            return tuple(dict.fromkeys([*below, *top]))
        if self.largest_share == 1:
            return tuple(top)
        odds = self.largest_share / (1 - self.largest_share)
        return (*below, *top * max(1, round(odds * len(below) / len(top))))

    def _with_aspects(self, sides: Sequence[int], patch: int) -> list[tuple[int, int]]:
        shapes = (
            (whole(side / aspect**0.5, patch), whole(side * aspect**0.5, patch))
            for side in sides
            for aspect in self.aspects
        )
        return list(dict.fromkeys(shapes))

    def up_to(self, largest: int, largest_share: float) -> SizeRange:
        """An equally dense range up to a new largest size, which has the fraction `share` of the batches."""
        several = self.count > 1 and self.largest > self.smallest
        ratio = (self.largest / self.smallest) ** (1 / (self.count - 1)) if several else USUAL
        smallest = min(self.smallest, largest)
        count = 1 + math.ceil(math.log(largest / smallest) / math.log(ratio) - 0.5)
        return replace(self, smallest=smallest, largest=largest, count=count, largest_share=largest_share)


def check_fields(config: object, *rules: tuple[str, bool, str]) -> None:
    """Raise ValueError for the first invalid field. A rule is (name, whether the value is valid, accepted values).

    Fields of one number or of a `Literal` are also checked against their types; NaN is no number.
    """
    by_type: list[tuple[str, bool, str]] = []
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            by_type.append((name, value in get_args(hint), ", ".join(map(repr, get_args(hint)))))
        elif hint in (int, float):
            right = isinstance(value, Integral if hint is int else Real) and value == value
            by_type.append((name, right, "whole numbers" if hint is int else "numbers"))
    for name, right, accepted in (*by_type, *rules):
        if not right:
            raise ValueError(f"{name} is {getattr(config, name)!r}; accepted: {accepted}")


def with_area(size: tuple[int, int], area: tuple[int, int], patch: int) -> tuple[int, int]:
    """A size in whole patches with the aspect ratio of `size` and about the area of `other`."""
    if size[0] * area[1] == size[1] * area[0]:
        return area
    scale = (area[0] * area[1] / (size[0] * size[1])) ** 0.5
    return whole(size[0] * scale, patch), whole(size[1] * scale, patch)


def whole(pixels: float, patch: int) -> int:
    """The nearest multiple of the patch, at least one patch."""
    return max(1, round(pixels / patch)) * patch


def tokens_of(size: tuple[int, int], patch: int) -> int:
    """Grid tokens of an image of `size` (height, width) pixels."""
    return (size[0] // patch) * (size[1] // patch)
