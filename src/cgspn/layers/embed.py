"""Images to tokens, and where a model has them, learned positions that follow the grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .mixer import Grid

PositionResize = Literal["bicubic", "bicubic_antialias", "bilinear_antialias"]


class PatchEmbed(nn.Module):
    """Images [B, in, H, W] -> tokens [B, h*w, C] and their grid; H and W any multiples of the patch size.

    With `crop`, any H and W from one patch up: pixels beyond the last whole patch are left out (SigLIP at 384 px).
    """

    def __init__(self, patch_size: int, channels: int, width: int, bias: bool = True, crop: bool = False) -> None:
        """patch_size in pixels; channels: of the image; width: C."""
        super().__init__()
        self.patch_size, self.crop = patch_size, crop
        self.projection = nn.Conv2d(channels, width, patch_size, patch_size, bias=bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Raises ValueError for a wrong number of dimensions or channels, or a size that patches do not tile."""
        p, channels = self.patch_size, self.projection.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected [B, {channels}, H, W]")
        height, width = images.shape[2:]
        if height < p or width < p or (not self.crop and (height % p or width % p)):
            nearest = tuple(max(p, round(side / p) * p) for side in (height, width))
            raise ValueError(
                f"images are {height} x {width} pixels; accepted: multiples of the patch size {p}, "
                f"the nearest being {nearest[0]} x {nearest[1]}"
            )
        return self.projection(images).flatten(2).transpose(1, 2), Grid(height // p, width // p)


class LearnedPositions(nn.Module):
    """Positions [h0*w0, C] learned at one grid, resized to any other.

    Antialiasing matters only to smaller grids. Each family of checkpoints has its own way, and features follow it.
    """

    def __init__(self, grid: tuple[int, int], width: int, resize: PositionResize = "bicubic") -> None:
        """grid: rows and columns that the table covers; width: C. Raises ValueError for an unknown `resize`."""
        super().__init__()
        if resize not in ("bicubic", "bicubic_antialias", "bilinear_antialias"):
            raise ValueError(f"resize is {resize!r}; accepted: 'bicubic', 'bicubic_antialias', 'bilinear_antialias'")
        self.grid, self.resize = grid, resize
        self.table = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """The table for a height x width grid: [h*w, C]."""
        if (height, width) == self.grid:
            return self.table
        table = self.table.T.reshape(1, -1, *self.grid).float()
        mode, _, antialias = self.resize.partition("_")
        resized = interpolate(table, (height, width), mode=mode, align_corners=False, antialias=bool(antialias))
        return resized[0].flatten(1).T.to(self.table.dtype)
