"""Patch embedding, and learned position embeddings resized to the grid."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..compat import is_tracing
from .mixer import Grid
from .plain import has_global_hooks, is_plain
from .resize import PositionResize, resize_matrix, resize_table


class PatchEmbed(nn.Module):
    """Images [B, in, H, W] -> tokens [B, h*w, C] and their grid. H and W are any multiples of the patch size.

    With `crop`, H and W may be any size from one patch up. Pixels after the last whole patch are ignored (SigLIP at 384
    px).
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        width: int,
        bias: bool = True,
        crop: bool = False,
        img_size: tuple[int, int] | None = None,
    ) -> None:
        """patch_size: in pixels; channels: of images; width: C; img_size: native (height, width) or None.

        The sizes are stored as pairs under timm's names, for code that reads them. forward takes any size.
        """
        super().__init__()
        self.patch_size, self.channels, self.crop = (patch_size, patch_size), channels, crop
        self.img_size = img_size or self.patch_size
        # keeps the weights in the shape of checkpoints; `forward` is a matrix product
        self.projection = nn.Conv2d(channels, width, patch_size, patch_size, bias=bias)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the grid at the native image size."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """Grid tokens at the native image size."""
        return self.grid_size[0] * self.grid_size[1]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches. Raises ValueError for sizes that `forward` does not accept."""
        p, channels = self.patch_size[0], self.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected [B, {channels}, H, W]")
        if not images.is_floating_point():
            raise ValueError(f"images has dtype {images.dtype}; accepted: floating point, normalised")
        height, width = images.shape[2:]
        if height < p or width < p or (not self.crop and (height % p or width % p)):
            nearest = tuple(max(p, round(side / p) * p) for side in (height, width))
            raise ValueError(
                f"images are {height} x {width} pixels; accepted: multiples of the patch size {p}, "
                f"the nearest being {nearest[0]} x {nearest[1]}"
            )
        return height // p, width // p

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Grid]:
        """mask: [B, h, w] bool; the pixels of patches where it is False are treated as zero.

        Raises ValueError for a wrong number of dimensions or channels, a size that is not a multiple of the patch size,
        or a mask that does not match the grid.
        """
        height, width = self.grid_of(images)
        dtype = next(self.projection.parameters()).dtype  # a wrapper may have no `weight`
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(f"images has dtype {images.dtype}; accepted: {dtype}, that of the weights, or autocast")
        if mask is not None:
            p = self.patch_size[0]
            if mask.shape != (images.shape[0], height, width):
                raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {(images.shape[0], height, width)}")
            if mask.dtype != torch.bool:
                raise ValueError(f"mask has dtype {mask.dtype}; accepted: torch.bool")
            outside = ~mask.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
            images = images[:, :, : height * p, : width * p].masked_fill(outside, 0.0)
        return self.project(images, height, width), Grid(height, width, mask=mask)

    def project(self, images: Tensor, height: int, width: int) -> Tensor:
        """Compute the patch convolution as one matrix product: [B, in, H, W] -> [B, h*w, C], contiguous.

        The output of a convolution is channels-first in memory. All later residual additions would inherit these
        strides and run at a third of the memory bandwidth.
        """
        # in export, views with symbolic sizes would specialise some of them
        if torch.compiler.is_exporting() or not is_plain(self.projection, nn.Conv2d) or has_global_hooks():
            tokens: Tensor = self.projection(images).flatten(2).transpose(1, 2)
            return tokens.clone(memory_format=torch.contiguous_format)
        p, weight = self.patch_size[0], self.projection.weight.flatten(1)
        if self.crop:
            images = images[:, :, : height * p, : width * p]
        batch, channels = images.shape[:2]
        patches = images.reshape(batch, channels, height, p, width, p).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.reshape(batch, height * width, channels * p * p), weight, self.projection.bias)


class LearnedPositions(nn.Module):
    """Position embeddings [h0*w0, C] learned on one grid and resized to others.

    The resize method depends on the checkpoint family and affects the features. Antialiasing only matters for smaller
    grids. "square_..." resizes to a square of the longer side and crops its upper left part (RADIO).
    """

    def __init__(self, grid: tuple[int, int], width: int, resize: PositionResize = "bicubic") -> None:
        """grid: rows and columns of the table; width: channels per token. Raises ValueError for an unknown `resize`."""
        super().__init__()
        if resize not in get_args(PositionResize):
            raise ValueError(f"resize is {resize!r}; accepted: {', '.join(map(repr, get_args(PositionResize)))}")
        self.grid, self.resize = grid, resize
        self.table = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.02)

    def forward(self, height: int, width: int, mask: Tensor | None = None) -> Tensor:
        """Return the positions of a height x width grid: [h*w, C]; with a mask [B, h, w], the result of `of_images`."""
        if mask is not None:
            return self.of_images(mask)
        if not is_tracing() and (height, width) == self.grid:  # a trace would be fixed to this size
            return self.table
        return self.resized(height, width)

    def resized(self, height: int, width: int) -> Tensor:
        """`forward` without the shortcut for the native size, for exported programs."""
        rows, columns = (torch.arange(1, wanted + 1, device=self.table.device) for wanted in (height, width))
        return self._resized(rows, columns).flatten(0, 1)

    def of_images(self, mask: Tensor) -> Tensor:
        """Return the positions of padded images, each resized to its own size: mask [B, h, w] bool -> [B, h*w, C].

        An image consists of the rows and columns where its mask has a True. The values in the padding have no meaning.
        """
        rows, columns = (mask.any(across).cumsum(1) for across in (2, 1))
        return self._resized(rows, columns).flatten(1, 2)

    def _resized(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The table resized to [..., h, w, C]; rows [..., h] and columns [..., w] are ranks for `resize_matrix`."""
        longer = torch.maximum(rows[..., -1:], columns[..., -1:]) if self.resize.startswith("square") else None
        by_row, by_column = (
            resize_matrix(ranks, size, self.resize, longer)
            for ranks, size in zip((rows, columns), self.grid, strict=True)
        )
        return resize_table(self.table.unflatten(0, self.grid), by_row, by_column).to(self.table.dtype)
