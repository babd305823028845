"""Loading of photographs for display, with the original aspect ratio and a given longer side."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import load_embedded
from ..data.folder import list_folder
from ..data.prepare import open_picture, prepare_for
from ..data.sizes import check_pixels
from ..data.skipped import Skipped
from ..data.source import EMBEDDED
from ..models.config import EncoderConfig
from .pictures import image_of, jpeg_uri, png_uri, tile

COLUMNS = 4  # embedded images per side of a canvas, since a single one has few patches
SHOWN_SIDE = 1024  # longer side in pixels inside a page; encoders get the full size
SMALL_SIDE = 256  # up to this size images are stored losslessly


@dataclass(frozen=True)
class Photograph:
    """A photograph to show: its path below the given folder, and uint8 [3, H, W], multiples of the patch size."""

    name: str
    pixels: Tensor


def fitted(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Height and width in whole patches, with a longer side of about `side` pixels and about the same aspect ratio."""
    scale = side / max(height, width)
    rows, columns = (max(1, round(length * scale / patch)) for length in (height, width))
    return rows * patch, columns * patch


def load_photographs(
    source: str, side: int, patch: int, limit: int, first: Collection[str] = ()
) -> tuple[list[Photograph], Skipped]:
    """Load the first photographs of a folder, or the embedded test images, sixteen per canvas.

    source: a folder, read with its sub-folders in the order of names, or "embedded". side: longer side in pixels,
    rounded to whole patches. limit: maximum number of photographs. first: paths below the folder of those that come
    before the others.

    Returns the photographs, and a report of files that could not be read. Raises FileNotFoundError or
    NotADirectoryError for no folder or no image files in it, and ValueError for `side` below a patch, `limit` below 1
    or no readable file.
    """
    if side < patch:
        raise ValueError(f"size is {side}; accepted: at least one patch, {patch} pixels")
    check_pixels(side, side)
    if limit < 1:
        raise ValueError(f"limit is {limit}; accepted: 1 or more")
    if source == EMBEDDED:
        return list(canvases(load_embedded("test").images, side, patch, limit)), Skipped()
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(f"images is {source}: no such folder")
    if not root.is_dir():
        raise NotADirectoryError(f"images is {source}: not a folder")
    files = [file for file, _ in list_folder(root, mixed=True)[1]]
    files.sort(key=lambda file: str(file.relative_to(root)) not in first)
    found: list[Photograph] = []
    bad: list[tuple[str, str]] = []
    for file in files:
        try:
            found.append(Photograph(str(file.relative_to(root)), _scaled(open_picture(file), side, patch)))
        # Decoders raise all kinds of errors on damaged files: OSError, SyntaxError, ValueError, struct.error, ...
        except Exception as error:
            bad.append((str(file), f"{type(error).__name__}: {error}"))
        if len(found) == limit:
            break
    skipped = Skipped(tuple(bad), len(found) + len(bad), "image files")
    if not found:
        raise ValueError(f"images is {source}: {skipped.summary()}")
    return found, skipped


def encoder_input(photograph: Photograph, config: EncoderConfig) -> Tensor:
    """The input of an encoder with this config: [1, channels, H, W], float32, normalised."""
    prepare = replace(prepare_for(config), size=None)
    return prepare(image_of(photograph.pixels.permute(1, 2, 0)))[None]


def photograph_uri(photograph: Photograph) -> str:
    """The photograph as a data URI: a JPEG of at most 1024 pixels per side, or a PNG if it is small."""
    pixels = photograph.pixels.permute(1, 2, 0)
    return png_uri(pixels) if max(pixels.shape[:2]) <= SMALL_SIDE else jpeg_uri(image_of(pixels), SHOWN_SIDE)


def _scaled(image: Image.Image, side: int, patch: int) -> Tensor:
    """An image as uint8 [3, H, W] in whole patches, its longer side about `side` pixels."""
    height, width = fitted(image.height, image.width, side, patch)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def canvases(images: Tensor, side: int, patch: int, limit: int) -> Iterator[Photograph]:
    """Tile small images uint8 [N, C, H, W], sixteen per canvas, with a longer side of about `side` pixels."""
    for start in range(0, min(limit * COLUMNS**2, len(images) - COLUMNS**2 + 1), COLUMNS**2):
        canvas = image_of(tile(images[start : start + COLUMNS**2], COLUMNS).expand(3, -1, -1).permute(1, 2, 0))
        yield Photograph(f"test images {start + 1} to {start + COLUMNS**2}", _scaled(canvas, side, patch))
