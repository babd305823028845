"""Rotary position embeddings of DINOv3: queries and keys are rotated by the patch's position relative to the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mixer import Grid


def rotary_angles(grid: Grid, head_width: int, base: float, device: torch.device) -> Tensor:
    """Rotation angles of the grid tokens, float32 [h*w, head_width], or [B, 1, h*w, head_width] for padded images.

    Channel i of a head is paired with channel i + d/2. Of the d/2 pairs, half rotate with the row and half with the
    column. base: base of the series of periods. Source: Siméoni et al., "DINOv3", 2025, section 3.2.
    """
    quarter = head_width // 4
    periods = base ** (2 * torch.arange(quarter, device=device, dtype=torch.float32) / (head_width // 2))
    if grid.mask is None:
        ranks = [torch.arange(1, side + 1, device=device) for side in (grid.height, grid.width)]
    else:  # an image consists of the rows and columns where its mask has a True
        ranks = [grid.mask.any(across).cumsum(1) for across in (2, 1)]
    rows, columns = (2 * math.pi * ((2 * n - 1) / n[..., -1:] - 1)[..., None] / periods for n in ranks)
    parts = torch.broadcast_tensors(rows[..., :, None, :], columns[..., None, :, :])
    angles = torch.cat([*parts, *parts], -1).flatten(-3, -2)
    return angles if grid.mask is None else angles[:, None]


def rotate(x: Tensor, angles: Tensor, prefix: int) -> Tensor:
    """Queries or keys [B, heads, prefix + h*w, d] rotated by `rotary_angles`; the prefix tokens are not rotated."""
    own = x[:, :, prefix:].float()
    first, second = own.chunk(2, -1)
    turned = own * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([x[:, :, :prefix], turned.to(x.dtype)], 2)
