"""Preprocessing of single images of any kind and size, from paths, tars or memory."""

import io
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..models.config import EncoderConfig, Resample
from .decode import to_rgb, turn_upright
from .opening import open_image
from .shards import ShardSet
from .sizes import Size, size_in_pixels
from .skipped import SkipCounter
from .transforms import MEAN, STD

THREADS = 4  # threads that prefetch; Pillow releases the GIL while it decodes and resizes

LONGEST = 16384  # longest side in pixels that is resized without cropping first
CHANNELS = (1, 3, 4)

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """A file of sample `number` in shards; part: one of `PARTS`."""

    shards: ShardSet
    number: int
    part: str

    def read(self) -> bytes:
        """Read the file as bytes. Raises OSError if it is unreadable or empty."""
        content = self.shards.read_parts(self.number, (self.part,))[self.part]
        if content is None:
            raise OSError(f"the sample has no {self.part} file")
        return content


Picture = str | Path | Image.Image | Member | np.ndarray | Tensor
"""What `open_picture` takes: a path, a PIL image, a member of a tar, or an array or tensor of pixels."""


def picture_name(picture: Picture) -> str:
    """The name of an image in messages."""
    if isinstance(picture, Member):
        return picture.shards.name(picture.number)
    return str(picture) if isinstance(picture, (str, Path)) else type(picture).__name__


def open_raw(picture: Picture) -> Image.Image:
    """The decoded image in its original mode. Raises OSError or ValueError for a damaged file."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray | Tensor):
        return array_picture(picture)
    with open_image(_content(picture)) as opened:
        opened.load()
        return opened


def open_picture(picture: Picture) -> Image.Image:
    """The image as RGB with its Exif orientation applied, transparent pixels white and 16 bits scaled to 8.

    `array_picture` describes arrays and tensors. Raises OSError for a missing file, ValueError for pixels of unknown
    range or an empty image, and either for a damaged file.
    """
    if isinstance(picture, Image.Image):  # the caller's image must not be modified
        return to_rgb(ImageOps.exif_transpose(picture))
    if isinstance(picture, np.ndarray | Tensor):
        return to_rgb(array_picture(picture))
    with open_image(_content(picture)) as opened:
        turn_upright(opened)
        return to_rgb(opened)


def _content(picture: str | Path | Member) -> Path | io.BytesIO:
    if not isinstance(picture, (str, os.PathLike, Member)):
        kinds = "a path, PIL image, array or tensor"
        raise TypeError(f"a picture is of type {type(picture).__name__}; accepted: {kinds}")
    return io.BytesIO(picture.read()) if isinstance(picture, Member) else Path(picture)


def array_picture(pixels: np.ndarray | Tensor) -> Image.Image:
    """Convert an array [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 (alpha) channels to a PIL image.

    Accepted values: bool; uint8; other integers from 0 to 255, or 0 to 65535 for uint16; floats from 0 to 1, rounded to
    8 bits. If both ends could be channels, the first is. Raises ValueError for other shapes and ranges.
    """
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu()
        pixels = pixels.float() if pixels.dtype.is_floating_point else pixels
    values = np.asarray(pixels)
    if values.ndim == 3 and values.shape[0] in CHANNELS:
        values = np.moveaxis(values, 0, 2)
    if values.dtype.kind not in "buif":
        raise ValueError(f"a picture has dtype {values.dtype}; accepted: bool, integers, floats")
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in CHANNELS) or not values.size:
        raise ValueError(f"a picture has shape {tuple(pixels.shape)}; accepted: [H, W], [C, H, W], [H, W, C]")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    top = 65535 if values.dtype.newbyteorder("=") == np.uint16 else 1 if values.dtype.kind == "f" else 255
    if not (values.min() >= 0 and values.max() <= top):
        found = f"a picture of {values.dtype} runs from {values.min():g} to {values.max():g}"
        raise ValueError(f"{found}; accepted: 0 to {top}")
    if values.dtype != np.uint8:
        values = (values.astype(np.float64) * (255 / top)).round().astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


@dataclass(frozen=True)
class Prepare:
    """Convert an image of any size to normalised float32 [channels, h, w], like the model's original library.

    Pillow resizes, as in the training and evaluation of CLIP, SigLIP and DINOv2.

    size: (height, width), or None to not resize. crop: True resizes the shorter side and takes a centre crop; False
    resizes the whole image to `size`. mean, std: per channel, for values in 0..1. channels: 3, or 1 for grey. crop_pct:
    fraction of the resized image's side that the crop keeps: at 0.875, 224 pixels of 256.
    """

    size: tuple[int, int] | None
    crop: bool = True
    resample: Resample = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels: int = 3
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"image_std is {self.std}; accepted: numbers above 0")

    def __call__(self, image: Image.Image) -> Tensor:
        """An image of any mode -> float32 [channels, h, w]. Raises ValueError like `open_picture`."""
        image = to_rgb(image)
        if self.channels == 1:
            image = image.convert("L")
        if self.size is not None and ((image.height, image.width) != self.size or self.crop_pct < 1):
            image = self.resized(image, *self.size)
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, self.channels).permute(2, 0, 1)
        mean, std = (torch.tensor(values[: self.channels])[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The image resized to `size`. Raises ValueError for an empty image."""
        if not (image.height and image.width):
            raise ValueError(f"a picture has {image.height} x {image.width} pixels; accepted: at least 1 x 1")
        filter_ = Image.Resampling[self.resample.upper()]
        full = int(height / self.crop_pct + 1e-6), int(width / self.crop_pct + 1e-6)
        if self.crop:
            # the longer side is rounded down and the crop too, as transformers and torchvision do
            scale = max(full[0] / image.height, full[1] / image.width)
            full = max(full[0], int(image.height * scale + 1e-6)), max(full[1], int(image.width * scale + 1e-6))
        top, left = (full[0] - height) // 2, (full[1] - width) // 2
        if max(full) <= LONGEST:
            return image.resize(full[::-1], filter_).crop((left, top, left + width, top + height))
        # crop a very long image before resizing it
        y, x = image.height / full[0], image.width / full[1]
        box = (left * x, top * y, min(image.width, (left + width) * x), min(image.height, (top + height) * y))
        return image.resize((width, height), filter_, box)


def prepare_for(config: EncoderConfig, size: Size = None) -> Prepare:
    """The preprocessing of an encoder, at its native size or another.

    Raises ValueError for a size that is not a multiple of the patch size.
    """
    return Prepare(
        size_in_pixels(config, size),
        config.image_crop,
        config.image_resample,
        config.image_mean,
        config.image_std,
        config.channels,
        config.image_crop_pct,
    )


def read_each(
    indices: Sequence[int], read: Callable[[int], T], name: Callable[[int], str], counter: SkipCounter
) -> Iterator[tuple[int, T]]:
    """Yield (index, read(index)) in order, prefetched by threads. Failures are left out and counted in `counter`.

    Raises the counter's ValueError if too many fail.
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
                    counter.add(0, [(index, name(index), f"{type(error).__name__}: {error}")])
                else:
                    counter.add(1, [])
                    yield index, result
                submit(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
