"""The object in an image with a dark background: a threshold, and everything it encloses."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def foreground(images: Tensor, threshold: int = 16) -> Tensor:
    """Tell object from background: background is the dark region connected to the border.

    A pixel is dark if no channel exceeds `threshold`, 0 to 255. Dark pixels that no 4-connected dark path joins to the
    border are holes in the object (a black logo, the eyelet of a shoe) and count as object.

    images: uint8 [N, C, H, W]. Returns bool [N, H, W], True on the object.
    """
    dark = pad(images.amax(1) <= threshold, (1, 1, 1, 1), value=True)
    outside = pad(torch.zeros_like(dark[:, 1:-1, 1:-1]), (1, 1, 1, 1), value=True)  # a frame around the image
    while True:  # a flood from the frame, one step at a time
        grown = outside.clone()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= dark
        if torch.equal(grown, outside):
            return ~outside[:, 1:-1, 1:-1]
        outside = grown
