"""Resizing of learned position embeddings as two small matrix products, over rows and columns.

Resampling is linear and separable, so this equals `torch.nn.functional.interpolate`, but the target size is a value in
a tensor: it may differ between the images of a batch, and stay dynamic in an exported program. The gradient is
deterministic on every device. One-column grids are correct too, for which PyTorch 2.13's antialiased resize on the CPU
repeats the first row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PositionResize = Literal[
    "bicubic", "bicubic_antialias", "bilinear_antialias", "square_bilinear", "square_bilinear_corners"
]


def resize_matrix(ranks: Tensor, size: int, resize: PositionResize, count: Tensor | None = None) -> Tensor:
    """The weights of `size` source lines for n target lines: [..., n, size] float32; rows sum to one.

    Args:
        ranks: [..., n], the numbers 1, 2, ... of the target lines; the last one is their count. Padding repeats the
            previous rank.
        size: number of source lines.
        resize: as in `LearnedPositions`; pixel centres as with align_corners=False, except for "..._corners".
        count: [..., 1], the number of target lines, if `ranks` holds only the first of them.

    Source: the cubic of Keys (1981), with a = -0.75 as PyTorch's plain one and -0.5 as its antialiased one (Pillow's).
    """
    ranks = ranks.float()
    count = (ranks[..., -1:] if count is None else count.float()).clamp(min=1.0)
    ratio = size / count
    centre = (ranks - 0.5) * ratio - 0.5
    if resize.startswith("square_bilinear"):
        if resize.endswith("corners"):
            centre = (ranks - 1.0) * (size - 1) / (count - 1.0).clamp(min=1.0)
        distance = torch.arange(size, device=ranks.device) - centre.clamp(0.0, size - 1.0)[..., None]
        return (1.0 - distance.abs()).clamp(min=0.0)
    mode, _, antialias = resize.partition("_")
    if not antialias:
        # four neighbours; those beyond the border repeat it
        source = torch.arange(-2, size + 2, device=ranks.device)
        near = _cubic(source - centre[..., None], -0.75)
        own = source.clamp(0, size - 1)[:, None] == torch.arange(size, device=ranks.device)
        return near @ own.float()
    stretch = ratio.clamp(min=1.0)[..., None]
    distance = (torch.arange(size, device=ranks.device) - centre[..., None]) / stretch
    weights = _cubic(distance, -0.5) if mode == "bicubic" else (1.0 - distance.abs()).clamp(min=0.0)
    return weights / weights.sum(-1, keepdim=True)


def resize_table(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resize table [h0, w0, C] by matrices [..., h, h0] and [..., w, w0]: float32 [..., h, w, C]."""
    width, channels = table.shape[1:]
    wide = (rows @ table.float().flatten(1)).unflatten(-1, (width, channels))
    return _turned((columns @ _turned(wide).flatten(-2)).unflatten(-1, (-1, channels)))


def _turned(t: Tensor) -> Tensor:
    """Transpose [..., a, b, C] to [..., b, a, C], copied, because in export views of views fix sizes of 1."""
    return t.transpose(-3, -2).clone(memory_format=torch.contiguous_format)


def _cubic(distance: Tensor, a: float) -> Tensor:
    d = distance.abs()
    inner = ((a + 2) * d - (a + 3)) * d * d + 1
    outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d < 1, inner, torch.where(d < 2, outer, 0.0))
