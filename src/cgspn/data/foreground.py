"""Foreground masks of objects on a dark background, by a threshold and a flood fill."""

import torch
from torch import Tensor


def foreground(images: Tensor, threshold: int = 16) -> Tensor:
    """The foreground mask of images; the background is the dark region connected to the border.

    A pixel is dark if no channel exceeds `threshold`, 0 to 255. Dark pixels without a 4-connected dark path to the
    border (a black logo, the eyelet of a shoe) count as object.

    images: uint8 [N, C, H, W]. Returns bool [N, H, W], True on the object.
    """
    dark = images.amax(1) <= threshold
    # Flood all images together, step by step, from a frame around them; finished images are removed. The frame makes
    # the border one connected region.
    n, h, w = dark.shape
    open_ = torch.ones(n, h + 2, w + 2, dtype=torch.bool, device=images.device)
    open_[:, 1:-1, 1:-1] = dark
    outside = torch.zeros_like(open_)
    outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1] = True, True, True, True
    active = torch.arange(n, device=images.device)
    while len(active):
        allowed, before = open_[active], outside[active]
        after = before.clone()
        # Each sweep spans the whole grid, so straight regions fill in one sweep.
        for i in range(1, h + 2):
            after[:, i] |= after[:, i - 1] & allowed[:, i]
        for i in range(h, -1, -1):
            after[:, i] |= after[:, i + 1] & allowed[:, i]
        for j in range(1, w + 2):
            after[:, :, j] |= after[:, :, j - 1] & allowed[:, :, j]
        for j in range(w, -1, -1):
            after[:, :, j] |= after[:, :, j + 1] & allowed[:, :, j]
        outside[active] = after
        active = active[(after != before).flatten(1).any(1)]
    return ~outside[:, 1:-1, 1:-1]
