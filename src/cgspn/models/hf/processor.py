"""Pictures to what an encoder takes, as an image processor of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from ..config import Resample

Aspect = Literal["crop", "squash", "keep"]


class CgspnImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg,misc]
    """The options that transformers does not know."""

    aspect: Aspect
    patch_size: int


class CgspnImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Pictures (PIL, arrays, tensors, paths; one or many) to pixel_values [B, C, H, W], resized and normalised.

    What to do with a picture of another aspect ratio is `aspect`: "crop" resizes it to fill `size` and cuts the
    middle, as the encoders are trained; "squash" resizes it to `size` outright; "keep" resizes it to as many pixels
    as `size` has, in its own aspect ratio rounded to whole patches, pads the batch to its largest and returns
    pixel_mask [B, H, W] (int64, 0 where padded), with which the models give what they give for each picture alone.

    Integers are taken to be 0 to 255, floats 0 to 1. Arrays and tensors are [H, W], [C, H, W] or [H, W, C].
    """

    model_input_names = ("pixel_values", "pixel_mask")
    valid_kwargs = CgspnImagesKwargs

    def __init__(
        self,
        size: Mapping[str, int] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        patch_size: int = 14,
        aspect: Aspect = "crop",
        resample: Resample = "bilinear",
        do_resize: bool = True,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        """The defaults of every call.

        Args:
            size: {"height": pixels, "width": pixels}; 378 x 378 if None.
            image_mean, image_std: per channel, of pixels in 0 to 1; as many channels come out.
            patch_size: in pixels, for aspect="keep".
            aspect: "crop", "squash" or "keep".
            resample: "bilinear" or "bicubic", antialiased.
            do_resize: False for pictures that have their size.
            do_normalize: False for pixels in 0 to 1.
            kwargs: what transformers adds.

        Raises ValueError for another size, aspect or resample.
        """
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 378, "width": 378})
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.patch_size, self.aspect, self.resample = patch_size, aspect, resample
        self.do_resize, self.do_normalize = do_resize, do_normalize
        _checked(self.size, aspect)
        if resample not in get_args(Resample):
            raise ValueError(f"resample is {resample!r}; accepted: 'bilinear', 'bicubic'")

    def preprocess(
        self,
        images: Any,
        *,
        size: Mapping[str, int] | None = None,
        aspect: Aspect | None = None,
        do_resize: bool | None = None,
        do_normalize: bool | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """pixel_values of the pictures, float32 on the device of the tensors given (the CPU for others).

        Args:
            images: a picture, a batch or a list of pictures.
            size, aspect, do_resize, do_normalize: instead of this processor's own.
            return_tensors: "pt", "np", or None for a list.

        Raises ValueError for what is no picture, floats far outside 0 to 1, or sizes that differ where none is made.
        """
        height, width = _checked(size or self.size, aspect := aspect or self.aspect)
        images = [_with_channel(i) for i in images] if isinstance(images, (list, tuple)) else _with_channel(images)
        pixels = [self._pixels(image) for image in make_flat_list_of_images(self.fetch_images(images))]
        if self.do_resize if do_resize is None else do_resize:
            pixels = [_fitted(image, height, width, aspect, self.patch_size, self.resample) for image in pixels]
        if self.do_normalize if do_normalize is None else do_normalize:
            pixels = [self._normalised(image) for image in pixels]
        sizes = [(image.shape[1], image.shape[2]) for image in pixels]
        if aspect != "keep":
            if len(set(sizes)) > 1:
                raise ValueError(f"images have sizes {sorted(set(sizes))}; accepted: one size, or aspect='keep'")
            return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)
        height, width = (max(side) for side in zip(*sizes, strict=True))
        padded = [pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(pixels, sizes, strict=True)]
        mask = torch.zeros(len(pixels), height, width, dtype=torch.long, device=padded[0].device)
        for row, (h, w) in zip(mask, sizes, strict=True):
            row[:h, :w] = 1
        return BatchFeature({"pixel_values": torch.stack(padded), "pixel_mask": mask}, tensor_type=return_tensors)

    def _pixels(self, image: Any) -> Tensor:
        """[C, H, W] float32 in 0 to 1."""
        channels = len(self.image_mean)
        if isinstance(image, Image.Image):
            image = np.asarray(image.convert("RGB" if channels == 3 else "L"))
        pixels = torch.as_tensor(np.array(image) if isinstance(image, np.ndarray) else image)
        if pixels.ndim == 3 and pixels.shape[0] not in (1, channels) and pixels.shape[2] in (1, channels):
            pixels = pixels.permute(2, 0, 1)
        if pixels.ndim != 3 or pixels.shape[0] not in (1, channels):
            raise ValueError(f"an image has shape {tuple(pixels.shape)}; accepted: 1 or {channels} channels")
        if not pixels.is_floating_point():
            pixels = pixels.float() / 255
        elif pixels.numel() and pixels.abs().max() > 2:  # resizing by others may overshoot 1 a little
            raise ValueError(
                f"an image holds floats up to {pixels.max():g}; accepted: integers 0 to 255, floats 0 to 1"
            )
        return pixels.float().expand(channels, -1, -1)

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = pixels.new_tensor([self.image_mean, self.image_std])[..., None, None]
        return (pixels - mean) / std


def _with_channel(image: Any) -> Any:
    """A grey array [H, W] as [1, H, W], which transformers takes for a picture; anything else as it is."""
    return image[None] if getattr(image, "ndim", 3) == 2 else image


def _checked(size: Mapping[str, int], aspect: str) -> tuple[int, int]:
    """Height and width. Raises ValueError for another size, or an aspect that does not exist."""
    if aspect not in get_args(Aspect):
        raise ValueError(f"aspect is {aspect!r}; accepted: 'crop', 'squash', 'keep'")
    if set(size) != {"height", "width"} or min(size.values()) < 1:
        raise ValueError(f"size is {dict(size)}; expected {{'height': pixels, 'width': pixels}}")
    return size["height"], size["width"]


def _fitted(pixels: Tensor, height: int, width: int, aspect: Aspect, patch: int, resample: Resample) -> Tensor:
    """[C, H, W] resized, antialiased, as `aspect` says."""
    own_height, own_width = pixels.shape[1:]
    new = height, width
    if aspect == "keep":
        scale = math.sqrt(height * width / (own_height * own_width)) / patch
        new = max(1, round(own_height * scale)) * patch, max(1, round(own_width * scale)) * patch
    elif aspect == "crop":
        scale = max(height / own_height, width / own_width)
        # max() because rounding must not make the resized picture smaller than the crop
        new = max(height, round(own_height * scale)), max(width, round(own_width * scale))
    resized = interpolate(pixels[None], new, mode=resample, antialias=True)[0].clamp(0, 1)  # bicubic overshoots
    if aspect == "crop":
        top, left = (new[0] - height) // 2, (new[1] - width) // 2
        resized = resized[:, top : top + height, left : left + width]
    return resized
