"""Pictures of any kind and size, one at a time: from paths, tars or memory to what an encoder takes."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .decode import to_rgb
from .shards import ShardSet
from .skipped import SkipCounter
from .transforms import MEAN, STD

THREADS = 4  # that decode ahead: Pillow lets go of the interpreter while it decodes and resizes

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """A file of a sample in shards.

    Attributes:
        shards: of an `open_shards`.
        number: of the sample.
        part: one of `PARTS`.
    """

    shards: ShardSet
    number: int
    part: str

    def read(self) -> bytes:
        """Its bytes. Raises OSError if they cannot be read, or there are none."""
        content = self.shards.read_parts(self.number, (self.part,))[self.part]
        if content is None:
            raise OSError(f"the sample has no {self.part} file")
        return content


Picture = str | Path | Image.Image | Member
"""What `open_picture` takes: a path, a PIL image or a member of a tar."""


def picture_name(picture: Picture) -> str:
    """For messages."""
    return picture.shards.name(picture.number) if isinstance(picture, Member) else str(picture)


def open_raw(picture: Picture) -> Image.Image:
    """The decoded picture in the mode that it was saved in. Raises what Pillow does for a damaged file."""
    if isinstance(picture, Image.Image):
        return picture
    with Image.open(io.BytesIO(picture.read()) if isinstance(picture, Member) else picture) as opened:
        opened.load()
        return opened


def open_picture(picture: Picture) -> Image.Image:
    """The picture as RGB, turned as its Exif orientation says, transparent pixels white.

    Raises OSError for a file that is missing, and all kinds of errors for a damaged one.
    """
    return to_rgb(ImageOps.exif_transpose(open_raw(picture)))


@dataclass(frozen=True)
class Prepare:
    """A picture of any size to the normalised float32 [channels, h, w] of an encoder, as the original library does.

    Resized by Pillow, which CLIP, SigLIP and DINOv2 were trained and are measured with.

    Attributes:
        size: (height, width); None for a picture that has its size already.
        crop: True resizes the shorter side and cuts out the middle, False squeezes all of the picture into `size`.
        resample: the filter.
        mean, std: per channel, of values in 0..1.
        channels: 3, or 1 for grey.
    """

    size: tuple[int, int] | None
    crop: bool = True
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels: int = 3

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB in, float32 [channels, h, w] out."""
        if self.channels == 1:
            image = image.convert("L")
        if self.size is not None and (image.height, image.width) != self.size:
            image = self.resized(image, *self.size)
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, self.channels).permute(2, 0, 1)
        mean, std = (torch.tensor(values[: self.channels])[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The image at the size given."""
        filter_ = Image.Resampling.BICUBIC if self.resample == "bicubic" else Image.Resampling.BILINEAR
        if not self.crop:
            return image.resize((width, height), filter_)
        # the longer side is rounded down and the crop too, as transformers and torchvision do
        scale = max(height / image.height, width / image.width)
        new = max(height, int(image.height * scale + 1e-6)), max(width, int(image.width * scale + 1e-6))
        top, left = (new[0] - height) // 2, (new[1] - width) // 2
        return image.resize(new[::-1], filter_).crop((left, top, left + width, top + height))


def read_each(
    indices: Sequence[int], read: Callable[[int], T], name: Callable[[int], str], tally: SkipCounter
) -> Iterator[tuple[int, T]]:
    """(index, read(index)) in order, read ahead by threads; what raises is left out and counted in `tally`.

    Raises ValueError from the tally when too many cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        todo = iter(indices)
        ahead: deque[tuple[int, Future[T]]] = deque()

        def submit(count: int) -> None:
            ahead.extend((index, pool.submit(read, index)) for index in itertools.islice(todo, count))

        try:
            submit(4 * THREADS)
            while ahead:
                index, future = ahead.popleft()
                try:
                    result = future.result()
                # Decoders raise all kinds of errors on damaged files: OSError, SyntaxError, struct.error, ...
                except Exception as error:
                    tally.add(0, [(index, name(index), f"{type(error).__name__}: {error}")])
                else:
                    tally.add(1, [])
                    yield index, result
                submit(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
