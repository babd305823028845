"""Decoding of a box of an image file to upright RGB pixels of a given size."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .opening import is_jpeg, open_image

ORIENTATION = 0x0112  # the Exif tag; values from 5 to 8 swap height and width
ON_ITS_SIDE = range(5, 9)
BAND = 1 << 20  # pixels per conversion step

Box = tuple[float, float, float, float]
"""(top, left, height, width) in pixels, inside the picture."""


def read_box(file: Path | IO[bytes], size: tuple[int, int], choose: Callable[[int, int], Box]) -> NDArray[np.uint8]:
    """Read a box of an image, resized with an antialiased bilinear filter.

    The Exif orientation is applied, transparent pixels become white, palettes, CMYK and 16-bit grey are converted, and
    the first frame of an animation is used. choose: maps height and width of the upright image to the box. Returns
    uint8 [*size, 3], size = (height, width).

    Raises OSError or ValueError for a file that is damaged or exceeds the limits.
    """
    with open_image(file) as opened:
        if not is_jpeg(opened):
            turn_upright(opened)
        sideways = opened.getexif().get(ORIENTATION) in ON_ITS_SIDE
        height, width = (opened.width, opened.height) if sideways else (opened.height, opened.width)
        box = choose(height, width)
        # the JPEG decoder can shrink by 2, 4 or 8 for free; twice the target size leaves the quality to the resize
        shrink = max(1.0, min(box[2] / size[0], box[3] / size[1]) / 2)
        opened.draft(None, (int(opened.width / shrink), int(opened.height / shrink)))
        turn_upright(opened)
        image = to_rgb(opened)
    # rounding must not move a box beyond the edge
    x, y = image.width / width, image.height / height
    top, left = max(0.0, box[0] * y), max(0.0, box[1] * x)
    bottom, right = min((box[0] + box[2]) * y, image.height), min((box[1] + box[3]) * x, image.width)
    resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, (left, top, right, bottom))
    return np.array(resized)


def turn_upright(image: Image.Image) -> None:
    """Decode an image and apply its Exif orientation in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about odd metadata
        ImageOps.exif_transpose(image, in_place=True)


def whole(height: int, width: int) -> Box:
    """The box of the whole image, for `read_box`."""
    return 0, 0, height, width


def middle(size: tuple[int, int]) -> Callable[[int, int], Box]:
    """The largest centred box with the aspect ratio of `size`, (height, width), for `read_box`."""

    def choose(height: int, width: int) -> Box:
        scale = min(height / size[0], width / size[1])
        box_height, box_width = size[0] * scale, size[1] * scale
        return (height - box_height) / 2, (width - box_width) / 2, box_height, box_width

    return choose


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB. Raises ValueError for grey values of unknown range."""
    rows = max(1, BAND // max(1, image.width))
    if image.mode == "RGB" or rows >= image.height:
        return _to_rgb(image)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):  # in bands, since intermediate images need up to five times the memory
        result.paste(_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return result


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow opens as "I;16" or "I" and would clip at 255 instead of scaling.
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("grey values outside 0..65535")
        return Image.fromarray((grey.astype(np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey values, whose range is not known")
    if image.mode == "La":  # grey times alpha, which Pillow can only convert to LA
        image = image.convert("LA")
    if image.has_transparency_data:
        # Blend over white, as browsers do; dropping alpha would show the hidden colour below it.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
