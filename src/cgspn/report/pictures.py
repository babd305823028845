"""Conversion of tensors to pictures for pages: data URIs and mosaics.

A picture is [H, W], [H, W, 3] or [H, W, 4], uint8 or float in 0..1.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

# Dark red to pale yellow: visible on grey, and by brightness alone.
HEAT = ((0.45, 0.00, 0.24), (0.80, 0.13, 0.15), (0.96, 0.45, 0.10), (1.00, 0.78, 0.20), (1.00, 0.98, 0.75))


def to_uint8(picture: Tensor) -> Tensor:
    """Convert a picture to uint8; float values are clipped to 0..1.

    Raises:
        ValueError: an invalid shape, or values that are not finite.
        TypeError: an integer type other than uint8.
    """
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (3, 4)) or 0 in picture.shape:
        raise ValueError(f"picture has shape {tuple(picture.shape)}; expected [H, W], [H, W, 3] or [H, W, 4]")
    if picture.dtype == torch.uint8:
        return picture
    if not picture.is_floating_point():
        raise TypeError(f"picture has dtype {picture.dtype}; accepted: torch.uint8, or float in 0..1")
    if not bool(torch.isfinite(picture).all()):
        raise ValueError("picture holds values that are not finite; accepted: 0 to 1")
    return (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def png_uri(picture: Tensor) -> str:
    """A picture as a PNG data URI.

    Raises the errors of `to_uint8`.
    """
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def png_bytes(picture: Tensor) -> bytes:
    """A picture as a PNG file. Raises the errors of `to_uint8`."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture).cpu().numpy()).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def jpeg_uri(picture: Tensor, side: int) -> str:
    """A smooth picture [H, W, 3] as a JPEG data URI with at most `side` pixels per side. Raises the errors of
    `to_uint8`."""
    image = Image.fromarray(to_uint8(picture).cpu().numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85, optimize=True, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def tile(images: Tensor, columns: int) -> Tensor:
    """Tile images [N, C, H, W] into one canvas [C, N/columns * H, columns * W], row by row, without gaps.

    Raises ValueError if N is not a multiple of columns.
    """
    if images.ndim != 4 or columns < 1 or len(images) % columns:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected [N, C, H, W], N a multiple of {columns}")
    count, channels, height, width = images.shape
    rows = images.view(count // columns, columns, channels, height, width)
    return rows.permute(2, 0, 3, 1, 4).reshape(channels, count // columns * height, columns * width)


def mosaic(pictures: Sequence[Tensor], columns: int, gap: int) -> Tensor:
    """Arrange pictures of one size in rows with transparent gaps: uint8 [.., .., 4].

    Raises ValueError for no pictures or different sizes, and the errors of `to_uint8`.
    """
    cells = [_rgba(picture) for picture in pictures]
    if not cells or len({cell.shape for cell in cells}) > 1 or columns < 1 or gap < 0:
        raise ValueError(
            f"pictures holds the shapes {[tuple(c.shape) for c in cells]}; expected one size, at least one"
        )
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    out = torch.zeros(rows * (height + gap) - gap, columns * (width + gap) - gap, 4, dtype=torch.uint8)
    for i, cell in enumerate(cells):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        out[top : top + height, left : left + width] = cell
    return out


def _rgba(picture: Tensor) -> Tensor:
    pixels = to_uint8(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    if pixels.shape[2] == 4:
        return pixels
    return torch.cat([pixels, torch.full_like(pixels[..., :1], 255)], -1)
