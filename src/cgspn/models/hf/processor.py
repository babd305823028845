"""An image processor of transformers for encoders."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from ...data.prepare import Prepare
from ..config import Resample
from ..variable_size import inside, padded
from .fit import FULL, Aspect, Fit, Sides, each_picture, filter_name, resizing, sides

OPTIONS: tuple[str, ...] = ("size", "aspect", "resample", "crop_pct", "image_mean", "image_std", "patch_size")
OPTIONS += ("do_convert_rgb", "do_resize", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
OPTIONS += ("do_normalize", "data_format", "input_data_format", "disable_grouping")


class CgspnImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg,misc]
    """Options that transformers lacks or defines differently."""

    aspect: Aspect
    patch_size: int
    crop_pct: float
    resample: Resample | int


class CgspnImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Converts images (PIL, arrays, tensors, paths; one or many) to resized and normalised pixel_values [B, C, H, W].

    Images are decoded and resized as in training and evaluation (`cgspn.data.prepare`). `aspect` says how an image with
    another aspect ratio is handled. "crop" resizes it to cover `size` and takes a centre crop, as in training. "squash"
    resizes it to `size`. "keep" keeps its aspect ratio, rounded to whole patches, with as many pixels as `size`; the
    batch is padded to its largest image, and pixel_mask [B, H, W] (int64, 0 where padded) is returned, with which the
    models give the same result as for each image alone.

    Integer images are assumed to be in 0..255 (16-bit: 0..65535) and float images in 0..1. Floats are not rescaled.
    Arrays and tensors are [H, W], [C, H, W] or [H, W, C].
    """

    model_input_names = ("pixel_values", "pixel_mask")
    valid_kwargs = CgspnImageProcessorKwargs
    do_convert_rgb = do_resize = do_rescale = do_normalize = True
    do_center_crop = False
    crop_size: Sides | None = None
    rescale_factor = 1 / FULL

    def __init__(
        self,
        size: Sides | None = None,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        patch_size: int = 14,
        aspect: Aspect = "crop",
        resample: Resample | int = "bilinear",
        crop_pct: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Set the defaults of all calls.

        Args:
            size: {"height": pixels, "width": pixels}, (height, width) or one side; 378 x 378 if None. Beside a
                crop_size also {"shortest_edge": pixels}.
            image_mean, image_std: per output channel, for pixels in 0 to 1.
            patch_size: in pixels, for aspect="keep".
            aspect: "crop", "squash" or "keep".
            resample: the name or number of a filter of Pillow.
            crop_pct: fraction of the resized image's side that the crop keeps, for "crop" and "squash".
            kwargs: further options of transformers and of `preprocess`.

        Raises ValueError for an invalid size, aspect or resample.
        """
        super().__init__(**kwargs)
        size = {"height": 378, "width": 378} if size is None else size
        if not self.do_center_crop:
            size = dict(zip(("height", "width"), sides("size", size), strict=True))
        self.size = size
        self.image_mean, self.image_std = _per_channel(image_mean), _per_channel(image_std)
        self.patch_size, self.aspect, self.crop_pct = patch_size, _known(aspect), crop_pct
        self.resample = filter_name(resample)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = "pt",
        device: str | torch.device | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Convert images to float32 pixel_values, on `device` if given, else on the input tensors' device or the CPU.

        Args:
            images: an image, a batch or a list of images.
            return_tensors: "pt", "np", or None for a list.
            options: replace this processor's settings: size, aspect, resample, crop_pct, image_mean, image_std,
                patch_size and the options of transformers. do_center_crop and crop_size take a centre crop after
                resizing to `size`, which may be {"shortest_edge": pixels}, instead of `aspect`. do_convert_rgb=False
                uses the channels as they are. do_rescale and rescale_factor are for integer images.

        Raises TypeError for an unknown option, and ValueError for inputs that are not images, pixels out of range,
        incompatible options, or images of different sizes without resizing.
        """
        if unknown := sorted(options.keys() - set(OPTIONS)):
            raise TypeError(f"preprocess has no {', '.join(unknown)}; accepted: {', '.join(OPTIONS)}")
        own = {name: getattr(self, name, None) for name in OPTIONS}
        said = SimpleNamespace(**own | {name: value for name, value in options.items() if value is not None})
        pictures = list(each_picture(images))
        if not pictures:
            raise ValueError("images is empty; expected at least one picture")
        keep = _known(said.aspect) == "keep"
        mean, std = _per_channel(said.image_mean), _per_channel(said.image_std)
        if not said.do_normalize:
            mean, std = [0.0] * len(mean), [1.0] * len(mean)
        cut = said.crop_size if said.do_center_crop else None
        fitted = resizing(said.size, cut, said.aspect, said.crop_pct) if said.do_resize else {"size": None}
        fit = Fit(
            Prepare(**fitted, resample=filter_name(said.resample), mean=tuple(mean), std=tuple(std)),
            said.rescale_factor if said.do_rescale else 1.0,
            said.patch_size if keep else 0,
            None if said.do_resize or cut is None else sides("crop_size", cut),
            said.do_convert_rgb,
            getattr(said.input_data_format, "value", said.input_data_format),
        )
        pixels = [fit(picture) for picture in pictures]
        batch = _padded(pixels) if keep else {"pixel_values": _stacked(pixels)}
        if getattr(said.data_format, "value", said.data_format) == "channels_last":
            batch["pixel_values"] = batch["pixel_values"].permute(0, 2, 3, 1)
        where = device or next((p.device for p in pictures if isinstance(p, Tensor)), "cpu")
        return BatchFeature({name: value.to(where) for name, value in batch.items()}, tensor_type=return_tensors)


def _known(aspect: Any) -> Aspect:
    if aspect not in get_args(Aspect):
        raise ValueError(f"aspect is {aspect!r}; accepted: 'crop', 'squash', 'keep'")
    return aspect


def _per_channel(values: float | Sequence[float]) -> list[float]:
    return [values] * 3 if isinstance(values, (int, float)) else list(values)


def _stacked(pixels: list[Tensor]) -> Tensor:
    sizes = sorted({tuple(image.shape[1:]) for image in pixels})
    if len(sizes) > 1:
        raise ValueError(f"images have sizes {sizes}; accepted: one size, or aspect='keep'")
    return torch.stack(pixels)


def _padded(pixels: list[Tensor]) -> dict[str, Tensor]:
    """Images [C, h, w] padded with zeros to the largest sides, and the mask of valid pixels."""
    sizes = [(image.shape[1], image.shape[2]) for image in pixels]
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    return {"pixel_values": padded(pixels, sizes, largest, patch=1), "pixel_mask": inside(sizes, largest).long()}
