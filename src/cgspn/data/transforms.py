"""Transforms of image batches: resizing, cropping, normalisation and augmentation, without torchvision.

All geometric transforms use `resample`, which resizes a box of each image with an antialiased bilinear (triangle)
filter, as two small matrix products per image. Boxes and flips may differ between images. The result equals a crop
followed by torch's antialiased interpolation.

Shapes: B images, C channels, H x W size, h x w new size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Size = int | tuple[int, int]

MEAN = STD = (0.5, 0.5, 0.5)
SCALE, RATIO = (0.6, 1.0), (3 / 4, 4 / 3)  # of random boxes: fraction of the area, width / height
PASTED = (0.05, 0.95)  # fraction of the area of a box of `paste_boxes`
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's "L" mode


def _pair(size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size is {size!r}; expected a positive int, or (height, width) of two")
    return pair


def to_float(images: Tensor) -> Tensor:
    """Convert images [B, 1 or 3, H, W], uint8 or float in 0..1, to float32 [B, 3, H, W] in 0..1. Grey is repeated.

    Raises ValueError for another number of channels or dimensions.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}; expected [B, 1 or 3, H, W]")
    return _unit(images).float().expand(-1, 3, -1, -1)


def _unit(images: Tensor) -> Tensor:
    """Convert bytes to float32 in 0..1. Grey stays one channel, which is faster."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalize(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """(images - mean) / std per channel; float [B, 3, H, W] in, the same out. Default: 0..1 becomes -1..1.

    Raises RuntimeError if the number of channels does not match the mean.
    """
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def _weights(begin: Tensor, length: Tensor, size: int, new: int, flip: Tensor | None) -> Tensor:
    """Rows of filter weights [B, new, size] that read `new` samples from [begin, begin + length) of `size` pixels."""
    scale = (length / new)[:, None, None]
    center = begin[:, None, None] + scale * (torch.arange(new, device=begin.device)[:, None] + 0.5)
    pixel = torch.arange(size, device=begin.device) + 0.5
    weights = (1 - (pixel - center).abs() / scale.clamp(min=1)).clamp(min=0)
    # The filter does not read pixels outside the box, as if the image had been cropped first.
    inside = (pixel > begin[:, None, None]) & (pixel < (begin + length)[:, None, None])
    weights = weights * inside
    weights = weights / weights.sum(-1, keepdim=True)
    return weights if flip is None else torch.where(flip[:, None, None], weights.flip(1), weights)


def resample(images: Tensor, boxes: Tensor, size: Size, flip: Tensor | None = None) -> Tensor:
    """Crop a box of each image and resize it with antialiasing, optionally flipped.

    images: float [B, C, H, W]. boxes: [B, 4] as (top, left, height, width) in whole pixels, inside the image. size:
    (h, w), of any aspect ratio. flip: bool [B], True flips horizontally. Returns [B, C, h, w], dtype of images.
    """
    h, w = _pair(size)
    top, left, height, width = boxes.to(images.device, torch.promote_types(images.dtype, torch.float32)).unbind(1)
    rows = _weights(top, height, images.shape[2], h, None).to(images.dtype)
    columns = _weights(left, width, images.shape[3], w, flip).to(images.dtype)
    return rows[:, None] @ images @ columns[:, None].mT


def resize(images: Tensor, size: Size) -> Tensor:
    """Resize float [B, C, H, W] to [B, C, h, w], antialiased, to any ratio. Raises ValueError for a size below 1."""
    new = _pair(size)
    if images.shape[2:] == new:
        return images
    return torch.nn.functional.interpolate(images, new, mode="bilinear", antialias=True, align_corners=False)


def center_crop(images: Tensor, size: Size) -> Tensor:
    """Resize float [B, C, H, W] to cover `size`, and take a centre crop [B, C, h, w].

    Raises ValueError for a size below 1.
    """
    h, w = _pair(size)
    height, width = images.shape[2:]
    scale = max(h / height, w / width)
    # max() because rounding must not make the resized image smaller than the crop.
    scaled = resize(images, (max(h, round(height * scale)), max(w, round(width * scale))))
    top, left = (scaled.shape[2] - h) // 2, (scaled.shape[3] - w) // 2
    return scaled[:, :, top : top + h, left : left + w]


def ratio_around(size: tuple[int, int]) -> tuple[float, float]:
    """Smallest and largest width / height of random boxes for `size`: `RATIO` times the width / height of `size`."""
    aspect = size[1] / size[0]
    return RATIO[0] * aspect, RATIO[1] * aspect


def boxes_from(
    uniform: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes int64 [count, 4] (top, left, height, width) of images of `height` x `width` pixels.

    uniform: random draws, float64 [4, count] in 0..1. The area is uniform in `scale`, fractions of the image area, and
    width / height log-uniform in `ratio`. A box that does not fit is shortened, so every box takes the same number of
    random draws.
    """
    area_u, ratio_u, top_u, left_u = uniform
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ratio_u)
    box_h = (area / aspect).sqrt().round().clamp(1, height)
    box_w = (area * aspect).sqrt().round().clamp(1, width)
    top = (top_u * (height - box_h + 1)).floor()
    left = (left_u * (width - box_w + 1)).floor()
    return torch.stack([top, left, box_h, box_w], 1).long()


def blend_factors(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Factors for `blend`, float32 [count]: uniform in 0..1 for a fraction `share` of the images, else 1."""
    proportion, drawn = torch.rand(2, count, generator=generator)
    return torch.where(drawn < share, proportion, 1.0)


def blend(images: Tensor, factors: Tensor) -> Tensor:
    """Mixup of neighbouring images (first and second, and so on): factor * image + (1 - factor) * neighbour. images:
    float [B, C, H, W]; factors: [B]. The last of an odd number is unchanged. Source: mixup; labels are not mixed.
    """
    factors = factors.to(images.device, images.dtype)[:, None, None, None]
    return factors * images + (1 - factors) * images[_partners(images, 1)]


def _partners(images: Tensor, bit: int) -> Tensor:
    """The index of each image's partner, int64 [B]: it differs in one bit, or is the image's own if there is none."""
    own = torch.arange(len(images), device=images.device)
    return torch.where(own ^ bit < len(images), own ^ bit, own)


def paste_boxes(count: int, share: float, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes for `paste`, int64 [count, 4] (top, left, height, width): random for a fraction `share` of the images, with
    nearly any area and an aspect ratio of at most 2, and empty for the others."""
    uniform = torch.rand(5, count, generator=generator, dtype=torch.float64)
    boxes = boxes_from(uniform[:4], height, width, PASTED, (1 / 2, 2))
    return boxes * (uniform[4] < share)[:, None]


def paste(images: Tensor, boxes: Tensor) -> Tensor:
    """CutMix without labels: paste a box of another image (the third into the first, and so on) at the same position.

    images: float [B, C, H, W]; boxes: from `paste_boxes`. Images without a partner are unchanged.
    """
    top, left, height, width = boxes.to(images.device)[:, :, None, None, None].unbind(1)
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside, images[_partners(images, 2)], images)


def jitter_factors(count: int, strength: float, generator: torch.Generator) -> Tensor:
    """Factors for `jitter_colors`, float32 [count, 3], uniform from 1 - strength to 1 + strength."""
    return 1 + strength * (2 * torch.rand(count, 3, generator=generator) - 1)


def jitter_colors(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, then contrast, then saturation of images, float [B, 3, H, W], clipped to 0..1.

    factors: float [B, 3], on any device; 1 changes nothing; 0 gives black (brightness), the mean grey (contrast) or a
    grey image (saturation). Source: the colour jitter of SimCLR, without hue.
    """
    bright, contrast, saturation = factors.to(images.device, images.dtype)[:, :, None, None, None].unbind(1)
    images = (images * bright).clamp(0, 1)
    luma = images.new_tensor(LUMA)[:, None, None]
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 1)
    return torch.lerp((images * luma).sum(1, keepdim=True), images, saturation).clamp(0, 1)


@dataclass(frozen=True)
class EvalTransform:
    """Transform uint8 [B, 1 or 3, H, W] to normalised float32 [B, 3, h, w] without randomness.

    crop: True keeps the aspect ratio and takes a centre crop; False resizes the whole image to `size`. mean, std: per
    channel, for images in 0..1.
    """

    size: Size
    crop: bool = True
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Transform a batch; the generator is not used."""
        scaled = (center_crop if self.crop else resize)(_unit(images), self.size)
        return normalize(to_float(scaled), self.mean, self.std)


@dataclass(frozen=True)
class TrainTransform:
    """Transform uint8 [B, 1 or 3, H, W] to normalised float32 [B, 3, h, w] with a random resized crop and a random
    flip.

    scale, ratio: as in `boxes_from`. flip: probability of a horizontal flip. jitter: strength of random brightness,
    contrast and saturation changes, 0 to 1. mean, std: per channel, for images in 0..1.
    """

    size: Size
    scale: tuple[float, float] = SCALE
    ratio: tuple[float, float] = RATIO
    flip: float = 0.5
    jitter: float = 0.0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Transform a batch; the same state of the generator gives the same result."""
        uniform = torch.rand(4, len(images), generator=generator, dtype=torch.float64)
        boxes = boxes_from(uniform, images.shape[2], images.shape[3], self.scale, self.ratio)
        flip = torch.rand(len(images), generator=generator) < self.flip
        out = to_float(resample(_unit(images), boxes, self.size, flip.to(images.device)))
        if self.jitter:
            out = jitter_colors(out, jitter_factors(len(out), self.jitter, generator))
        return normalize(out, self.mean, self.std)
