"""One entry for the commands: the embedded images by name, or a folder of one's own."""

from __future__ import annotations

from pathlib import Path

import torch

from .embedded import Split, load_embedded
from .folder import load_folder
from .image_set import ImageSet

EMBEDDED = "embedded"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's "L" mode uses


def load_images(source: str | Path, size: tuple[int, int], channels: int, split: Split) -> ImageSet:
    """Images for an encoder of `channels` input channels.

    Args:
        source: "embedded", or a folder with one sub-folder for each class, or of images alone.
        size: height and width that a folder's images are brought to; the embedded ones keep theirs.
        channels: 1 or 3; colour becomes grey, and grey becomes three equal channels, where the encoder needs it.
        split: which part of the embedded images; a folder has no parts.

    Raises what `load_folder` raises, and ValueError for other numbers of channels. Unreadable files are skipped,
    counted and named on standard error.
    """
    if channels not in (1, 3):
        raise ValueError(f"the encoder takes {channels} channels; accepted: 1 or 3")
    images = load_embedded(split) if str(source) == EMBEDDED else load_folder(source, size)[0]
    given = images.images.shape[1]
    if given == channels:
        return images
    if channels == 3:
        return ImageSet(images.images.expand(-1, 3, -1, -1), images.labels, images.class_names)
    grey = torch.stack([_grey(image) for image in images.images])  # one by one: a float copy of all would be large
    return ImageSet(grey, images.labels, images.class_names)


def _grey(image: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(LUMA)[:, None, None]
    return (image * weights).sum(0, keepdim=True).round().to(torch.uint8)
