"""Tensors to pictures inside the page: PNG data URIs, patches large enough to be seen, heat over a photograph.

Pictures here are [H, W], [H, W, 3] or [H, W, 4], uint8, or float in 0..1.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

# Dark red to pale yellow: reads on grey, and by brightness alone where colours cannot be told apart.
HEAT = ((0.45, 0.00, 0.24), (0.80, 0.13, 0.15), (0.96, 0.45, 0.10), (1.00, 0.78, 0.20), (1.00, 0.98, 0.75))
MARKER = (0.10, 0.85, 1.00)


def to_uint8(picture: Tensor) -> Tensor:
    """A picture as uint8, float values outside 0..1 cut off.

    Raises:
        ValueError: a shape that is no picture, or values that are not finite.
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
    """A picture as the `data:` URI of a PNG, for the `src` of an image.

    Raises as `to_uint8`.
    """
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def png_bytes(picture: Tensor) -> bytes:
    """A picture as a PNG file. Raises as `to_uint8`."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture).cpu().numpy()).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def enlarge(picture: Tensor, factor: int) -> Tensor:
    """Every pixel as a block of factor x factor pixels: [H, W, ...] -> [factor*H, factor*W, ...].

    Raises ValueError for a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}; accepted: 1 or more")
    return picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def tile(images: Tensor, columns: int) -> Tensor:
    """Images [N, C, H, W] as one canvas [C, N/columns * H, columns * W], row by row, without gaps.

    Raises ValueError if N is not a multiple of columns.
    """
    if images.ndim != 4 or columns < 1 or len(images) % columns:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected [N, C, H, W], N a multiple of {columns}")
    count, channels, height, width = images.shape
    rows = images.view(count // columns, columns, channels, height, width)
    return rows.permute(2, 0, 3, 1, 4).reshape(channels, count // columns * height, columns * width)


def mosaic(pictures: Sequence[Tensor], columns: int, gap: int) -> Tensor:
    """Pictures of one size side by side, row by row, with transparent gaps: uint8 [.., .., 4].

    Raises ValueError for no pictures, different sizes, or what `to_uint8` refuses.
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


def heat_colours(values: Tensor) -> Tensor:
    """Values in 0..1, [...], as colours [..., 3] from dark red to pale yellow."""
    stops = torch.tensor(HEAT, dtype=torch.float32, device=values.device)
    place = values.float().clamp(0, 1) * (len(HEAT) - 1)
    lower = place.floor().clamp(max=len(HEAT) - 2).long()
    share = (place - lower)[..., None]
    return stops[lower] * (1 - share) + stops[lower + 1] * share


def heat_overlay(photo: Tensor, values: Tensor, position: tuple[int, int], *, factor: int = 1) -> Tensor:
    """A map of non-negative values laid over a grey photograph, with a ring around one position.

    The colour goes with the square root of the value, so that what is weak but far away is seen as well. The scale
    ends at the largest value away from the position: a position nearly always sees itself most, and would leave
    nothing for the rest.

    Args:
        photo: [H, W] or [H, W, 3]; multiples of the map's size.
        values: [h, w], such as an influence map or a row of an attention map.
        position: (row, column) on the map.
        factor: how many screen pixels a pixel of the photograph becomes, a side.

    Returns:
        Float [factor*H, factor*W, 3] in 0..1.

    Raises:
        ValueError: sizes that do not fit, a position outside the map, negative values or values that are not finite.
    """
    if values.ndim != 2 or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(f"values has shape {tuple(values.shape)}; expected [h, w], finite and not negative")
    h, w = values.shape
    if photo.shape[0] % h or photo.shape[1] % w or photo.shape[0] // h != photo.shape[1] // w:
        raise ValueError(f"photo is {tuple(photo.shape[:2])}; expected one whole multiple of the map's {h} x {w}")
    row, column = position
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"position is {position}; accepted: a position of the map, {h} x {w}")
    patch = photo.shape[0] // h
    elsewhere = values.float().clone()
    elsewhere[row, column] = 0
    top = float(elsewhere.max())
    shares = (values.float() / top).clamp(max=1).sqrt() if top > 0 else torch.zeros(h, w)
    shares[row, column] = 1
    grey = to_uint8(photo).float() / 255
    grey = (grey.mean(-1) if grey.ndim == 3 else grey)[..., None].expand(-1, -1, 3)
    heat, strength = enlarge(heat_colours(shares), patch), enlarge(0.88 * shares, patch)[..., None]
    # Photographs on black would hide faint heat; a raised floor keeps both.
    base = 0.10 + 0.62 * grey
    out = enlarge(base * (1 - strength) + heat * strength, factor)
    side = patch * factor
    return _ring(out, (row + 0.5) * side, (column + 0.5) * side, 0.95 * side + 2)


def _ring(picture: Tensor, row: float, column: float, radius: float) -> Tensor:
    """A bright ring with a dark edge, so that it shows on any ground."""
    rows = torch.arange(picture.shape[0])[:, None] + 0.5 - row
    columns = torch.arange(picture.shape[1])[None] + 0.5 - column
    off = (rows.square() + columns.square()).sqrt().sub(radius).abs()[..., None]
    out = torch.where(off < 3.2, torch.zeros_like(picture), picture)
    return torch.where(off < 1.8, picture.new_tensor(MARKER), out)


def _rgba(picture: Tensor) -> Tensor:
    pixels = to_uint8(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    if pixels.shape[2] == 4:
        return pixels
    return torch.cat([pixels, torch.full_like(pixels[..., :1], 255)], -1)
