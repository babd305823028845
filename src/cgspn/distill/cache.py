"""A cache of the teacher's features across epochs, for images without augmentation.

It helps if images are seen often and their features fit in memory: small datasets and teachers, and fixed crops
(`OptimConfig.augment` off). Features take 5.1 MB per image for a ViT-S/14 at 224 px, and 94 MB for an SO400M/14 at 378
px. A disk with 7 GB/s would deliver the latter at a tenth of the speed at which an H100 computes them, so the cache is
only in memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .taps import Taps

DTYPE = torch.bfloat16
Size = tuple[int, ...]  # (height, width) of images in pixels


class TeacherCache:
    """Taps by image and size, in bfloat16 in CPU memory. Once it is full, taps of other images are computed each time.

    Newly computed features are rounded too, so that a run that resumes with an empty cache gets the same values. Valid
    for one teacher without augmentation.
    """

    def __init__(self, limit: float) -> None:
        """limit: maximum number of bytes per process."""
        self.limit, self.used = limit, 0
        self.owner: object = None
        self.kept: dict[tuple[int, Size], list[Tensor]] = {}
        self.like: dict[Size, Taps] = {}

    def belongs_to(self, owner: object) -> None:
        """Clear the cache unless it belongs to `owner`, an object that identifies the teacher."""
        if owner != self.owner:
            self.kept.clear()
            self.like.clear()
            self.owner, self.used = owner, 0

    @torch.no_grad()
    def taps(self, indices: Tensor, compute: Callable[[], Taps], size: Size = ()) -> Taps:
        """The taps of images `indices`, int64 [B], at a size: computed unless the cache has all of them."""
        keys = [(index, size) for index in indices.tolist()]
        if all(key in self.kept for key in keys):
            like = self.like[size]
            rows = [torch.stack(features) for features in zip(*(self.kept[key] for key in keys))]
        else:
            taps = compute()
            rows = [feature.to(DTYPE) for feature in taps.features()]
            like = self.like[size] = taps.with_features([feature.new_empty(0) for feature in taps.features()])
            self._keep(keys, rows)
        # with the device and the dtypes of computed features
        return like.with_features([row.to(one) for row, one in zip(rows, like.features(), strict=True)])

    def _keep(self, keys: list[tuple[int, Size]], rows: list[Tensor]) -> None:
        """Store copies of the features of single images while there is room."""
        each = sum(row[0].nbytes for row in rows)
        host = [row.cpu() for row in rows] if self.used + each <= self.limit else []
        for i, key in enumerate(keys):
            if key not in self.kept and self.used + each <= self.limit:
                self.kept[key] = [row[i].clone() for row in host]
                self.used += each
