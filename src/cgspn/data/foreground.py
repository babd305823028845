"""Foreground masks of objects on a dark background, by a threshold and a flood fill."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def foreground(images: Tensor, threshold: int = 16) -> Tensor:
    """The foreground mask of images; the background is the dark region connected to the border.

    A pixel is dark if no channel exceeds `threshold`, 0 to 255. Dark pixels without a 4-connected dark path to the
    border (a black logo, the eyelet of a shoe) count as object.

    images: uint8 [N, C, H, W]. Returns bool [N, H, W], True on the object.
    """
    dark = pad(images.amax(1) <= threshold, (1, 1, 1, 1), value=True)
    outside = pad(torch.zeros_like(dark[:, 1:-1, 1:-1]), (1, 1, 1, 1), value=True)
    while True:  # flood all images together, step by step, from the frame around them
        grown = outside.clone()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= dark
        if torch.equal(grown, outside):
            return ~outside[:, 1:-1, 1:-1]
        outside = grown
