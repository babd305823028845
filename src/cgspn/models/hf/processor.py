"""An image processor of transformers for encoders."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from ..config import Resample
from ..variable_size import inside, padded
from .fit import Aspect, Sides, each_picture, filter_name, is_float, resizing, sides

FULL = 255  # largest value of decoded pixels


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
            image_mean, image_std: per channel, of pixels in 0 to 1; as many channels come out.
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
        size: Sides | None = None,
        aspect: Aspect | None = None,
        resample: Resample | int | None = None,
        crop_pct: float | None = None,
        do_convert_rgb: bool | None = None,
        do_resize: bool | None = None,
        do_center_crop: bool | None = None,
        crop_size: Sides | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        patch_size: int | None = None,
        return_tensors: str | None = "pt",
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        disable_grouping: bool | None = None,
    ) -> BatchFeature:
        """Convert images to float32 pixel_values, on `device` if given, else on the input tensors' device or the CPU.

        Args:
            images: an image, a batch or a list of images.
            size, aspect, resample, crop_pct, image_mean, image_std, patch_size: replace this processor's settings, as
                do the options below. With crop_size, size may also be {"shortest_edge": pixels}.
            do_convert_rgb: False uses the channels as they are, without converting colours.
            do_resize: False for images that already have their size.
            do_center_crop, crop_size: take a centre crop after resizing to `size`, instead of `aspect`.
            do_rescale, rescale_factor: for integer images.
            do_normalize: False to only rescale.
            return_tensors: "pt", "np", or None for a list.
            data_format: "channels_first" or "channels_last" for pixel_values.
            input_data_format: the same for input arrays with ambiguous shapes.
            disable_grouping: no effect.

        Raises ValueError for inputs that are not images, pixels out of range, incompatible options, or images of
        different sizes without resizing.
        """
        pictures = list(each_picture(images))
        if not pictures:
            raise ValueError("images is empty; expected at least one picture")

        def option(name: str, given: Any) -> Any:
            return getattr(self, name, None) if given is None else given

        aspect = _known(option("aspect", aspect))
        mean, std = (_per_channel(option(*own)) for own in (("image_mean", image_mean), ("image_std", image_std)))
        if not option("do_normalize", do_normalize):
            mean, std = [0.0] * len(mean), [1.0] * len(mean)
        factor = option("rescale_factor", rescale_factor) if option("do_rescale", do_rescale) else 1.0
        fit = resizing(
            option("size", size) if option("do_resize", do_resize) else None,
            option("crop_size", crop_size) if option("do_center_crop", do_center_crop) else None,
            aspect,
            filter_name(option("resample", resample)),
            option("crop_pct", crop_pct),
        )
        fit = replace(
            fit,
            patch=option("patch_size", patch_size) if aspect == "keep" else 0,
            convert=option("do_convert_rgb", do_convert_rgb),
            layout=getattr(input_data_format, "value", input_data_format),
        )
        pixels = []
        for picture in pictures:
            scale = 1.0 if is_float(picture) else FULL * factor  # floats are already in 0 to 1
            own = replace(fit.prepare, mean=tuple(m / scale for m in mean), std=tuple(s / scale for s in std))
            pixels.append(replace(fit, prepare=own)(picture))
        batch = _padded(pixels) if aspect == "keep" else {"pixel_values": _stacked(pixels)}
        if getattr(data_format, "value", data_format) == "channels_last":
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
