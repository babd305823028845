"""Encoding of images with different sizes in padded and masked batches of few shapes, with the same results as alone.

`encoder.forward_variable_size(images)` maps a list of [channels, H, W] to a list of EncoderOutput in the same order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from .cuda_graphs import CapturedEncoder
    from .encoder import Encoder, EncoderOutput

Shape = tuple[int, int]  # rows and columns of patches
Method = Literal["bucket", "pad"]
DISTINCT = 256  # most distinct grids in `choose_shapes`, because each merge takes quadratic time


@dataclass(frozen=True)
class Batch:
    """Images of one batch. indices: their places in the list; shape: rows and columns to which they are padded."""

    indices: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Packing:
    """How a list of images is divided into batches. grids: rows and columns of each image; batches: the images of each
    batch."""

    grids: tuple[Shape, ...]
    batches: tuple[Batch, ...]

    @property
    def efficiency(self) -> float:
        """Fraction of the computed tokens that are not padding."""
        computed = sum(len(batch.indices) * math.prod(batch.shape) for batch in self.batches)
        return sum(map(math.prod, self.grids)) / computed

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The distinct input shapes (batch size, rows, columns); a compiled encoder compiles each of them."""
        return sorted({(len(batch.indices), *batch.shape) for batch in self.batches})


def choose_shapes(grids: Sequence[Shape], count: int) -> list[Shape]:
    """Choose at most `count` shapes such that each image fits into one of them with little padding.

    Starts with one shape per grid and repeatedly merges the pair that adds the least padding. Call it once with the
    sizes of the whole dataset, and pass the result to `encode_variable_size` for every batch. For 2000 images of equal
    area with aspect ratios around 1 (standard deviation of the logarithm 0.35), 11% of the tokens are padding with 8
    shapes and 4% with 16. If the side lengths vary too (0.3), 28% are padding with 16 shapes and 13% with 64.

    grids: rows and columns of patches of each image. Raises ValueError for an empty sequence or a count below 1.
    """
    if not grids or count < 1:
        raise ValueError(f"choose_shapes got {len(grids)} grids and a count of {count}; expected at least one of each")
    step = 1
    while len(number := Counter(tuple(-(-side // step) * step for side in grid) for grid in grids)) > max(
        DISTINCT, count
    ):
        step += 1
    shape = np.array(list(number), dtype=np.int64)
    images = np.array(list(number.values()), dtype=np.int64)
    while len(shape) > count:
        joined = np.maximum(shape[:, None], shape[None])
        own = images * shape.prod(1)
        cost = (images[:, None] + images[None]) * joined.prod(2) - own[:, None] - own[None]
        np.fill_diagonal(cost, np.iinfo(np.int64).max)
        into, gone = sorted(divmod(int(cost.argmin()), len(shape)))
        shape[into], images[into] = joined[into, gone], images[into] + images[gone]
        shape, images = np.delete(shape, gone, 0), np.delete(images, gone)
    shapes = [(int(rows), int(columns)) for rows, columns in shape]
    while True:  # an image may now fit into a smaller shape than its own, which then shrinks
        held = _held(grids, shapes)
        smaller = sorted((max(grids[i][0] for i in own), max(grids[i][1] for i in own)) for own in held.values())
        if smaller == shapes:
            return shapes
        shapes = smaller


def pack(
    grids: Sequence[Shape],
    *,
    method: Method = "bucket",
    max_tokens: int = 16384,
    max_shapes: int = 16,
    shapes: Sequence[Shape] | None = None,
) -> Packing:
    """Return how `encode_variable_size` divides images of these grids into batches. It has the same arguments and
    errors."""
    if method not in ("bucket", "pad"):
        raise ValueError(f"method is {method!r}; accepted: 'bucket', 'pad'")
    for name, value in (("max_tokens", max_tokens), ("max_shapes", max_shapes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: from 1 up")
    if not grids:
        raise ValueError("images is empty; expected at least one image")
    if method == "pad":
        batches = _consecutive(grids, max_tokens)
    else:
        batches = _buckets(grids, max_tokens, choose_shapes(grids, max_shapes) if shapes is None else shapes)
    return Packing(tuple(grids), tuple(batches))


def encode_variable_size(
    encoder: Encoder | CapturedEncoder,
    images: Sequence[Tensor],
    *,
    method: Method = "bucket",
    max_tokens: int = 16384,
    max_shapes: int = 16,
    shapes: Sequence[Shape] | None = None,
) -> list[EncoderOutput]:
    """Encode images of any sizes and aspect ratios, with the same results and gradients as for each image on its own.

    Args:
        encoder: an `Encoder`, compiled or not, or a `CapturedEncoder`.
        images: tensors [channels, H, W] with the same dtype and device.
        method: "bucket" groups the images into a few shapes and pads each image to its shape. "pad" puts as many
            consecutive images as `max_tokens` allows into a batch and pads them to the largest.
        max_tokens: maximum number of grid tokens per batch, including padding. A larger image gets its own batch.
        max_shapes: maximum number of shapes for "bucket". Batch sizes are powers of two, so the encoder sees at most
            max_shapes * (1 + log2(max_tokens)) different input shapes.
        shapes: fixed list of (rows, columns) in patches, such as the result of `choose_shapes` for a whole dataset. It
            limits the number of input shapes over all calls, for `torch.compile` and CUDA graphs.

    Returns:
        One EncoderOutput per image, in order: tokens [h, w, C] and pooled [C or embed_dim]. `pack` returns the batches
        and the amount of padding.

    Raises ValueError for an image that the encoder does not accept, images of different dtypes or devices, an image
    that fits none of `shapes`, or a wrong option.
    See docs/sizes.md.
    """
    grids = []
    for index, image in enumerate(images):
        try:
            grids.append(encoder.patch_embed.grid_of(image[None]))
        except ValueError as error:
            raise ValueError(f"images[{index}]: {error}") from error
        if (image.dtype, image.device) != (images[0].dtype, images[0].device):
            raise ValueError(
                f"images[{index}] is {image.dtype} on {image.device}; images[0] is {images[0].dtype} on "
                f"{images[0].device}; expected one dtype and device"
            )
    outputs: list[EncoderOutput | None] = [None] * len(images)
    packing = pack(grids, method=method, max_tokens=max_tokens, max_shapes=max_shapes, shapes=shapes)
    for batch in packing.batches:
        own = [grids[index] for index in batch.indices]
        batched = padded([images[index] for index in batch.indices], own, batch.shape, encoder.config.patch_size)
        # no mask unless needed, because attention is then faster
        mask = None if all(grid == batch.shape for grid in own) else inside(own, batch.shape).to(batched.device)
        out = encoder(batched, mask)
        for row, (index, (height, width)) in enumerate(zip(batch.indices, own, strict=True)):
            outputs[index] = out._replace(tokens=out.tokens[row, :height, :width], pooled=out.pooled[row])
    return [output for output in outputs if output is not None]


def padded(images: Sequence[Tensor], grids: Sequence[Shape], shape: Shape, patch: int) -> Tensor:
    """Pad images to [B, channels, H, W] to the right and below, without pixels after the last whole patch."""
    rows = []
    for image, (height, width) in zip(images, grids, strict=True):
        beyond = (0, (shape[1] - width) * patch, 0, (shape[0] - height) * patch)
        rows.append(pad(image[:, : height * patch, : width * patch], beyond))
    return torch.stack(rows)


def inside(grids: Sequence[Shape], shape: Shape) -> Tensor:
    """[B, h, w] bool, True inside each image."""
    heights, widths = torch.tensor(grids).T[..., None, None]
    return (torch.arange(shape[0])[:, None] < heights) & (torch.arange(shape[1]) < widths)


def _consecutive(grids: Sequence[Shape], max_tokens: int) -> list[Batch]:
    batches: list[Batch] = []
    for index, grid in enumerate(grids):
        last = batches[-1] if batches else Batch((), grid)
        shape = max(last.shape[0], grid[0]), max(last.shape[1], grid[1])
        if batches and (len(last.indices) + 1) * math.prod(shape) <= max_tokens:
            batches[-1] = Batch((*last.indices, index), shape)
        else:
            batches.append(Batch((index,), grid))
    return batches


def _buckets(grids: Sequence[Shape], max_tokens: int, shapes: Sequence[Shape]) -> list[Batch]:
    batches = []
    for shape, indices in sorted(_held(grids, shapes).items()):
        most = max(1, max_tokens // math.prod(shape))
        while indices:
            size = 1 << (min(most, len(indices)).bit_length() - 1)
            batches.append(Batch(tuple(indices[:size]), shape))
            indices = indices[size:]
    return batches


def _held(grids: Sequence[Shape], shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Assign every image to the smallest fitting shape: shape -> indices. Raises ValueError if an image fits none."""
    held: dict[Shape, list[int]] = {}
    for index, grid in enumerate(grids):
        fitting = [shape for shape in shapes if shape[0] >= grid[0] and shape[1] >= grid[1]]
        if not fitting:
            size = f"{grid[0]} x {grid[1]}"
            raise ValueError(f"images[{index}] has {size} patches, which fit into none of {list(shapes)}")
        held.setdefault(min(fitting, key=math.prod), []).append(index)
    return held
