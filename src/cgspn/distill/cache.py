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
        """The taps of images `indices`, int64 [B], at a size, from the cache if it has all, else computed."""
        keys = [(index, size) for index in indices.tolist()]
        if all(key in self.kept for key in keys):
            rows = [torch.stack(features) for features in zip(*(self.kept[key] for key in keys))]
            return unpack(rows, self.like[size])
        taps = compute()
        rows = [feature.to(DTYPE) for feature in pack(taps)]
        self.like[size] = nothing_of(taps)
        each = sum(row[0].nbytes for row in rows)
        host = [row.cpu() for row in rows] if self.used + each <= self.limit else []
        for i, key in enumerate(keys):
            if key not in self.kept and self.used + each <= self.limit:
                self.kept[key] = [row[i].clone() for row in host]
                self.used += each
        return unpack(rows, self.like[size])


def pack(taps: Taps) -> list[Tensor]:
    """A list of all features without duplicates, because the output of a block is the input of the next one."""
    stream = taps.block_inputs + taps.blocks[-1:] if taps.block_inputs else taps.blocks
    return [*taps.sublayers, *stream, taps.tokens, taps.pooled]


def nothing_of(taps: Taps) -> Taps:
    """Taps of zero images, with the same shapes, dtypes, device and grid."""
    entries, branches, blocks = ([f[:0] for f in each] for each in (taps.block_inputs, taps.sublayers, taps.blocks))
    return Taps(entries, branches, blocks, taps.tokens[:0], taps.pooled[:0], taps.grid)


def unpack(rows: list[Tensor], like: Taps) -> Taps:
    """The inverse of `pack`, with the dtypes, device and grid of `like`."""
    depth, device = len(like.blocks), like.tokens.device
    sublayers, stream = rows[:depth], [row.to(device, like.blocks[0].dtype) for row in rows[depth:-2]]
    return Taps(
        block_inputs=stream[:-1] if like.block_inputs else [],
        sublayers=[row.to(device, one.dtype) for row, one in zip(sublayers, like.sublayers)],
        blocks=[entry[:, like.grid.prefix :] for entry in stream[1:-1]] + stream[-1:] if like.block_inputs else stream,
        tokens=rows[-2].to(device, like.tokens.dtype),
        pooled=rows[-1].to(device, like.pooled.dtype),
        grid=like.grid,
    )
