"""The sizes and batches that an exported program accepts, and those at which it is checked."""

from dataclasses import dataclass

from torch import Tensor

from ..data.sizes import check_pixels
from ..models.config import EncoderConfig


@dataclass(frozen=True)
class Bounds:
    """Accepted input sizes: heights and widths from `min_size` to `max_size` pixels in steps of the patch size, and
    batches of 1 to `max_batch`.

    Height and width are independent: any aspect ratio within the bounds.
    """

    patch: int
    min_size: int
    max_size: int
    max_batch: int

    @property
    def grid(self) -> tuple[int, int]:
        """The bounds of a side in patches."""
        return self.min_size // self.patch, self.max_size // self.patch

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless images [B, channels, H, W] lie within the bounds."""
        batch, _, *sides = images.shape
        fits = all(self.min_size <= side <= self.max_size and side % self.patch == 0 for side in sides)
        if not (fits and 1 <= batch <= self.max_batch):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; exported for batches of 1 to {self.max_batch} and sides of "
                f"{self.min_size} to {self.max_size} pixels, multiples of {self.patch}"
            )

    def sizes(self, native: tuple[int, int]) -> list[tuple[int, int, int]]:
        """Return the (batch, height, width) to compare at: smallest, largest, extreme aspect ratios and native size."""
        small, large, most = self.min_size, self.max_size, self.max_batch
        own = tuple(min(max(side // self.patch * self.patch, small), large) for side in native)
        middle = (small + large) // 2 // self.patch * self.patch
        tried = [
            (most, small, small),
            (1, small, large),
            (min(2, most), large, small),
            (min(3, most), middle, min(middle + self.patch, large)),
            (min(2, most), own[0], own[1]),
            (1, large, large),
        ]
        return list(dict.fromkeys(tried))


def bounds_for(
    config: EncoderConfig, min_size: int | None = None, max_size: int | None = None, max_batch: int = 32
) -> Bounds:
    """The bounds of an encoder, by default from one patch to twice the longer native side.

    Raises ValueError for sizes that are not multiples of the patch size, an empty range, or a batch below 1.
    """
    patch = config.patch_size
    low = patch if min_size is None else min_size
    high = 2 * max(config.image_size) // patch * patch if max_size is None else max_size
    for name, value in (("size" if low == high else "min_size", low), ("max_size", high)):
        if value < patch or value % patch:
            raise ValueError(f"{name} is {value}; accepted: multiples of the patch size {patch}")
    check_pixels(high, high)
    if low > high:
        raise ValueError(f"min_size is {low}, above max_size {high}")
    if max_batch < 1:
        raise ValueError(f"max_batch is {max_batch}; accepted: from 1 up")
    return Bounds(patch, low, high, max_batch)
