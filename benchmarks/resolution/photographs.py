"""Photographs in memory, as squares: those to train with and those held out."""

from __future__ import annotations

import glob
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from cgspn.data import ImageSet, open_shards
from cgspn.data.locate import cache_folder

Item = TypeVar("Item")


def read_tar(path: Path, part: str, make: Callable[[Image.Image], Item]) -> list[Item]:
    """The pictures of a shard, in its order; part: "image" or "mask"."""
    shards = open_shards(str(path), cache_folder())
    encoded = (shards.read_parts(i, (part,))[part] for i in range(len(shards)))
    return [make(Image.open(io.BytesIO(content))) for content in encoded if content is not None]


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    rgb = image.convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def square(image: Image.Image, side: int) -> Tensor:
    """The middle of a picture, uint8 [3, side, side]."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return pixels(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box))


def load_photographs(
    patterns: Sequence[str], held_out: int, side: int, device: torch.device
) -> tuple[ImageSet, Tensor]:
    """Photographs of all shards that match, to train with, and held-out ones uint8 [held_out, 3, side, side].

    Held-out ones are the last of a fixed shuffle.

    Raises OSError for shards that are not there, ValueError for fewer photographs than are held out.
    """
    shards = sorted(Path(path) for pattern in patterns for path in glob.glob(pattern))
    photos = torch.stack(
        [picture for shard in shards for picture in read_tar(shard, "image", lambda i: square(i, side))]
    )
    if not 0 < held_out < len(photos):
        raise ValueError(f"held_out is {held_out}; accepted: 1 to {len(photos) - 1}, of {len(photos)} photographs")
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))
    kept, held = photos[order[:-held_out]].to(device), photos[order[-held_out:]].to(device)
    return ImageSet(kept, torch.zeros(len(kept), dtype=torch.int64), ("photograph",)), held
