"""Conversion of tensors to pictures for pages: data URIs and sheets.

A picture is [H, W] or [H, W, 3], uint8 or float in 0..1.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

# Dark red to pale yellow: visible on grey, and by brightness alone.
HEAT = ((0.45, 0.00, 0.24), (0.80, 0.13, 0.15), (0.96, 0.45, 0.10), (1.00, 0.78, 0.20), (1.00, 0.98, 0.75))
GREY = (128, 136, 144)  # of titles; visible on light and on dark


def image_of(picture: Tensor) -> Image.Image:
    """Convert a picture to a PIL image, with floats clipped to 0..1. Raises ValueError for NaN or infinity."""
    if picture.is_floating_point():
        if not bool(torch.isfinite(picture).all()):
            raise ValueError("picture holds values that are not finite; accepted: 0 to 1")
        picture = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(picture.cpu().numpy())


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png_uri(picture: Tensor) -> str:
    """A picture as a PNG data URI. Raises the errors of `image_of`."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image_of(picture))).decode("ascii")


def jpeg_uri(image: Image.Image, side: int) -> str:
    """A smooth image as a JPEG data URI with at most `side` pixels per side."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=85, optimize=True, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def tile(images: Tensor, columns: int) -> Tensor:
    """Tile images [N, C, H, W], N a multiple of columns, into a canvas [C, N/columns * H, columns * W]."""
    return images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def sheet(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], size: tuple[int, int], gap: int) -> Image.Image:
    """Arrange pictures in rows below column titles, RGBA with transparent gaps.

    size: height and width of each picture, which is resized to cover them and cropped.
    """
    height, width = size
    band = max(14, width // 12)
    out = Image.new("RGBA", (len(titles) * (width + gap) - gap, band + len(rows) * (height + gap)), (255, 255, 255, 0))
    font = ImageFont.load_default(0.75 * band)
    for column, title in enumerate(titles):
        left = column * (width + gap)
        ImageDraw.Draw(out).text((left + width / 2, band / 2), title, GREY, font, anchor="mm")
        for row, pictures in enumerate(rows):
            picture = ImageOps.fit(image_of(pictures[column]), (width, height), Image.Resampling.BILINEAR)
            out.paste(picture, (left, band + gap + row * (height + gap)))
    return out
