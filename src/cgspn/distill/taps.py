"""Where teacher and student are compared: after each sub-layer (PP) and after each block (PB)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..layers import Grid
from ..models.encoder import Encoder


class Taps(NamedTuple):
    """What one forward pass shows, grid tokens only, in the order of the blocks.

    entries: tokens [B, N, C] entering each block, prefix tokens included.
    sublayers: PP, the branch of each mixing sub-layer before the residual, [B, h*w, C].
    blocks: PB, the output of each block, [B, h*w, C].
    tokens: after the last norm, [B, h*w, C]. pooled: [B, C]. grid: the grid of the entries.
    """

    entries: list[Tensor]
    sublayers: list[Tensor]
    blocks: list[Tensor]
    tokens: Tensor
    pooled: Tensor
    grid: Grid


def tapped_forward(encoder: Encoder, images: Tensor) -> Taps:
    """The encoder's forward pass with every tap recorded. images [B, channels, H, W], normalised.

    Raises ValueError for an image size that the patches do not tile. Source: "Key Designs" 3.
    """
    tokens, grid = encoder.embed(images)
    entries, sublayers, blocks = [], [], []
    for block in encoder.each_block():
        entries.append(tokens)
        branch = block.sublayer(tokens, grid)
        tokens = block.mlp_half(tokens + branch)
        sublayers.append(branch[:, grid.prefix :])
        blocks.append(tokens[:, grid.prefix :])
    tokens = encoder.norm(tokens)
    return Taps(entries, sublayers, blocks, tokens[:, grid.prefix :], encoder.forward_head(tokens, grid), grid)
