"""Pictures to what an encoder takes, as an image processor of transformers."""

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
    """The options that transformers does not know, or not in this form."""

    aspect: Aspect
    patch_size: int
    crop_pct: float
    resample: Resample | int


class CgspnImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Pictures (PIL, arrays, tensors, paths; one or many) to pixel_values [B, C, H, W], resized and normalised.

    They are decoded and resized as in training and evaluation (`cgspn.data.prepare`). What to do with a picture of
    another aspect ratio is `aspect`: "crop" resizes it to fill `size` and cuts the middle, as the encoders are trained;
    "squash" resizes it to `size` outright; "keep" resizes it to as many pixels as `size` has, in its own aspect ratio
    rounded to whole patches, pads the batch to its largest and returns pixel_mask [B, H, W] (int64, 0 where padded),
    with which the models give what they give for each picture alone.

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
        """The defaults of every call.

        Args:
            size: {"height": pixels, "width": pixels}, (height, width) or one side; 378 x 378 if None. Beside a
                crop_size also {"shortest_edge": pixels}.
            image_mean, image_std: per channel, of pixels in 0 to 1; as many channels come out.
            patch_size: in pixels, for aspect="keep".
            aspect: "crop", "squash" or "keep".
            resample: the name or number of a filter of Pillow.
            crop_pct: share of the resized picture's side that is cut out, for "crop" and "squash".
            kwargs: what transformers adds, such as the other options of `preprocess`.

        Raises ValueError for another size, aspect or resample.
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
        """pixel_values of the pictures, float32, on `device`, else that of the tensors given, else the CPU.

        Args:
            images: a picture, a batch or a list of pictures.
            return_tensors: "pt", "np", or None for a list.
            options: in place of this processor's own: size, aspect, resample, crop_pct, image_mean, image_std,
                patch_size, and those of transformers. do_center_crop and crop_size cut the middle out of what `size`
                makes ({"shortest_edge": pixels} too), in place of `aspect`; do_rescale and rescale_factor are of
                integers; do_convert_rgb=False takes channels as the encoder's, whatever they mean.

        Raises TypeError for another option, ValueError for what is no picture, pixels outside of their range, options
        that exclude one another, or sizes that differ where none is made.
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
    """Images [C, h, w] padded with zeros to the largest sides, and which pixels are theirs."""
    sizes = [(image.shape[1], image.shape[2]) for image in pixels]
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    return {"pixel_values": padded(pixels, sizes, largest, patch=1), "pixel_mask": inside(sizes, largest).long()}
