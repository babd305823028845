"""Parsing and checking of image sizes."""

from ..models.config import EncoderConfig
from .opening import MOST_PIXELS

Size = int | tuple[int, int] | None
"""In pixels: a side, or (height, width); None for the encoder's own."""


def parse_size(text: str) -> int | tuple[int, int]:
    """Parse a size: "448" for a square, "448x756" for height and width. Raises ValueError for other text."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"size holds {text!r}; accepted: a side in pixels such as 448, or height x width as 448x756")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def check_pixels(height: int, width: int) -> None:
    """Raise ValueError for images that are larger than any that is read, before memory is taken for them."""
    if height * width > MOST_PIXELS:
        raise ValueError(f"size is {height} x {width} pixels; accepted: at most {MOST_PIXELS:,}, that is 8192 x 8192")


def size_in_pixels(config: EncoderConfig, size: Size) -> tuple[int, int]:
    """The height and width of an encoder's input. Raises ValueError unless they are multiples of the patch."""
    if size is None:
        return config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    patch = config.patch_size
    if min(height, width) < patch or (not config.crop_remainder and (height % patch or width % patch)):
        nearest = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
        raise ValueError(f"size is {size}; accepted: multiples of the patch size {patch}, the nearest being {nearest}")
    check_pixels(height, width)
    return height, width
