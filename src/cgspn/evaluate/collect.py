"""Run a function over a whole source of images and keep what it returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.loader import ImageSource, Transform, one_pass


def collect(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    source: ImageSource,
    *,
    transform: Transform,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, ...]:
    """Apply a function to every image, without gradients, in order.

    Args:
        function: from images float [B, 3, h, w] on `device` to one tensor or several, each [B, ...].
        source: an `ImageSet` or any other `ImageSource`, of at least one image.
        transform: as in `cgspn.data.batches`; an `EvalTransform` as a rule.
        batch_size: images at a time.
        device: where the images are sent.
        progress: called after each batch with the number of images in it.

    Returns:
        A tuple of tensors [N, ...] on the CPU, one for each tensor of the function, in the dtypes it gave.

    Raises:
        ValueError: an empty source.
    """
    if len(source) == 0:
        raise ValueError("source is empty; expected at least 1 image")
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in one_pass(source, batch_size, transform=transform):
            out = function(batch.images.to(device))
            parts.append(tuple(t.cpu() for t in (out if isinstance(out, tuple) else (out,))))
            if progress is not None:
                progress(len(batch.indices))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
