"""A labelled set of images of one size, held in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import class_captions
from .foreground import foreground


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images uint8 [N, 1 or 3, H, W] of one size, labels int64 [N], and the class name of each label.

    Raises TypeError for a wrong dtype, and ValueError for a wrong shape or a label without a class name.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, given, dtype in (("images", self.images, torch.uint8), ("labels", self.labels, torch.int64)):
            if given.dtype != dtype:
                raise TypeError(f"{name} has dtype {given.dtype}; accepted: {dtype}")
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise ValueError(f"images has shape {tuple(self.images.shape)}; expected [N, 1 or 3, H, W]")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels has shape {tuple(self.labels.shape)}; expected [N] = [{len(self.images)}]")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise ValueError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}; "
                f"accepted: 0 to {len(self.class_names) - 1}, one class name each"
            )

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 1 or 3, H, W] and labels int64 [B] at `indices`, int64 [B]."""
        return self.images[indices], self.labels[indices]

    def subset(self, indices: Tensor) -> ImageSet:
        """The subset of the images at `indices`, int64 [M] (or a bool mask [N])."""
        return ImageSet(self.images[indices], self.labels[indices], self.class_names)

    def captions(self, seed: int = 0, indices: Tensor | None = None) -> list[str]:
        """Return one caption per image, or per index in `indices`, int64 [M]: `class_captions` of their labels."""
        return class_captions(self.labels, self.class_names, seed, indices)

    def masks(self, threshold: int = 16) -> Tensor:
        """Return semantic masks uint8 [N, H, W]: 0 for background, 1 + label for foreground.

        The foreground is everything that is not connected to the border by dark pixels (see `foreground`). This works
        for images of one object on a dark background, such as the embedded ones.
        """
        inside = foreground(self.images, threshold)
        return inside.to(torch.uint8) * (self.labels + 1).to(torch.uint8)[:, None, None]
