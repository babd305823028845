"""Images to tokens, and where a model has them, learned positions that follow the grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .mixer import Grid


class PatchEmbed(nn.Module):
    """Images [B, in, H, W] -> tokens [B, h*w, C] and their grid; H and W any multiples of the patch size."""

    def __init__(self, patch_size: int, channels: int, width: int, bias: bool = True) -> None:
        """patch_size in pixels; channels: of the image; width: C."""
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(channels, width, patch_size, patch_size, bias=bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Raises ValueError for a wrong number of dimensions or channels, or a size that patches do not tile."""
        p, channels = self.patch_size, self.projection.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected [B, {channels}, H, W]")
        height, width = images.shape[2:]
        if height < p or width < p or height % p or width % p:
            nearest = tuple(max(p, round(side / p) * p) for side in (height, width))
            raise ValueError(
                f"images are {height} x {width} pixels; accepted: multiples of the patch size {p}, "
                f"the nearest being {nearest[0]} x {nearest[1]}"
            )
        return self.projection(images).flatten(2).transpose(1, 2), Grid(height // p, width // p)


class LearnedPositions(nn.Module):
    """Positions [h0*w0, C] learned at one grid, resized bicubically to any other."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        """grid: rows and columns that the table covers; width: C."""
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """The table for a height x width grid: [h*w, C]."""
        if (height, width) == self.grid:
            return self.table
        table = self.table.T.reshape(1, -1, *self.grid).float()
        resized = interpolate(table, (height, width), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.to(self.table.dtype)
