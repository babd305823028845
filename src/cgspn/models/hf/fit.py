"""Conversion of one image of any kind to float32 [C, H, W] with an image processor's options."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.prepare import CHANNELS, Prepare, array_picture, open_picture, open_raw
from ..config import Resample

Aspect = Literal["crop", "squash", "keep"]
Sides = int | Sequence[int] | Mapping[str, int]
FULL = 255  # largest value of decoded pixels


@dataclass(frozen=True)
class Fit:
    """The conversion of images: size, channels and normalisation.

    Attributes:
        prepare: size, crop and filter, and mean and std for pixels times `factor`.
        factor: scale of integer pixels; floats are already in 0 to 1.
        patch: if not 0, keep each image's aspect ratio with as many pixels as prepare.size, in whole patches.
        window: (height, width) of the centre crop of an image that is not resized.
        convert: images are converted to RGB or grey; otherwise their channels are used as they are.
        layout: "channels_first" or "channels_last" for arrays with ambiguous shapes.
    """

    prepare: Prepare
    factor: float = 1 / FULL
    patch: int = 0
    window: tuple[int, int] | None = None
    convert: bool = True
    layout: str | None = None

    def __call__(self, picture: Any) -> Tensor:
        """float32 [C, H, W]. Raises ValueError for a wrong number of channels, and the errors of `open_picture`."""
        count = len(self.prepare.mean)
        if self.convert and count in (1, 3):
            planes, channels = [open_picture(self._first(picture))], count
        else:
            planes, channels = self._planes(picture), 1
        if len(planes) * channels != count:
            raise ValueError(f"an image has {len(planes)} channels; accepted: {count}, as image_mean has")
        scale = 1.0 if _is_float(picture) else FULL * self.factor
        parts = []
        for n, plane in enumerate(planes):
            own = slice(n * channels, (n + 1) * channels)
            mean, std = (tuple(v / scale for v in values[own]) for values in (self.prepare.mean, self.prepare.std))
            parts.append(self._resized(plane, replace(self.prepare, channels=channels, mean=mean, std=std)))
        return torch.cat(parts)

    def _resized(self, image: Image.Image, prepare: Prepare) -> Tensor:
        if self.window is not None:
            top, left = ((own - side) // 2 for own, side in zip((image.height, image.width), self.window))
            image = image.crop((left, top, left + self.window[1], top + self.window[0]))
        elif self.patch and prepare.size is not None:
            scale = math.sqrt(math.prod(prepare.size) / max(1, image.height * image.width)) / self.patch
            height, width = (max(1, round(side * scale)) * self.patch for side in (image.height, image.width))
            prepare = replace(prepare, size=(height, width), crop=False, crop_pct=1.0)
        return prepare(image)

    def _planes(self, picture: Any) -> list[Image.Image]:
        """Each channel as a grey image."""
        if isinstance(picture, Image.Image):
            return list(picture.split())
        return [array_picture(plane) for plane in ([picture] if picture.ndim == 2 else self._first(picture))]

    def _first(self, picture: Any) -> Any:
        """An array or tensor with channels first, if `layout` says where they are; anything else unchanged."""
        if not isinstance(picture, (np.ndarray, Tensor)) or picture.ndim != 3:
            return picture
        known = CHANNELS if self.convert else (len(self.prepare.mean),)
        last = picture.shape[0] not in known and picture.shape[2] in known
        if not (last if self.layout is None else self.layout == "channels_last"):
            return picture
        return picture.permute(2, 0, 1) if isinstance(picture, Tensor) else np.moveaxis(picture, 2, 0)


def each_picture(images: Any) -> Iterator[Any]:
    """Yield the images of nested lists and batches. Paths are opened. Raises ValueError for anything else."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from each_picture(image)
    elif isinstance(images, str) and images.startswith(("http://", "https://")):
        from transformers.image_utils import load_image

        yield load_image(images)
    elif isinstance(images, (str, Path)):
        yield open_raw(images)
    elif isinstance(images, (np.ndarray, Tensor, Image.Image)):
        yield images
    else:
        raise ValueError(f"an image is a {type(images).__name__}; accepted: a PIL image, an array, a tensor or a path")


def _is_float(picture: Any) -> bool:
    kind = getattr(picture, "dtype", None)
    return kind.is_floating_point if isinstance(kind, torch.dtype) else getattr(kind, "kind", "") == "f"


def resizing(size: Sides, crop_size: Sides | None, aspect: Aspect, pct: float) -> dict[str, Any]:
    """The size, crop and crop_pct of `Prepare` for given options. crop_size None does not crop. Raises ValueError."""
    if crop_size is None:
        return {"size": sides("size", size), "crop": aspect == "crop", "crop_pct": pct}
    height, width = sides("crop_size", crop_size)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        pct, crop = max(height, width) / size["shortest_edge"], True
    else:
        full = sides("size", size)
        pct, crop = height / full[0], False
        if height * full[1] != width * full[0]:
            raise ValueError(f"crop_size is {(height, width)} of size {full}; accepted: the same shape")
    if not 0 < pct <= 1:
        raise ValueError(f"crop_size is {(height, width)}, which is larger than size {size}; accepted: up to it")
    return {"size": (height, width), "crop": crop, "crop_pct": pct}


def sides(name: str, size: Sides) -> tuple[int, int]:
    """Height and width from any form of a size. Raises ValueError for invalid ones."""
    values: list[Any]
    if isinstance(size, int):
        values = [size, size]
    elif isinstance(size, Sequence):
        values = list(size)
    else:  # transformers' own type is not a Mapping
        values = [size[key] for key in ("height", "width")] if set(size) == {"height", "width"} else []
    if len(values) != 2 or not all(isinstance(v, int) and v >= 1 for v in values):
        raise ValueError(f"{name} is {size}; expected {{'height': pixels, 'width': pixels}}")
    return values[0], values[1]


def filter_name(resample: Any) -> Resample:
    """A Pillow resampling filter by name or number. Raises ValueError for an unknown filter."""
    name = str(getattr(resample, "value", resample)).lower()
    for accepted in get_args(Resample):
        if name in (accepted, str(Image.Resampling[accepted.upper()].value)):
            return accepted  # type: ignore[no-any-return]
    raise ValueError(f"resample is {resample!r}; accepted: {', '.join(map(repr, get_args(Resample)))}")
