"""The interface that attention, window attention, C-GSPN and GSPN have in common."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

Window = tuple[int, int]  # rows and columns of positions


class Grid(NamedTuple):
    """Layout of tokens [B, prefix + height * width, C]: `prefix` class and register tokens, then the rows of the grid.

    `mask` [B, height, width] bool marks the positions inside the image; None means all of them. `window` is set if the
    tokens are sorted by window (`window_attention`); None means row order.
    """

    height: int
    width: int
    prefix: int = 0
    mask: Tensor | None = None
    window: Window | None = None

    @property
    def tokens(self) -> int:
        """Number of grid tokens, without the prefix."""
        return self.height * self.width


class Mixer(nn.Module):
    """Base class of mixers: tokens [B, N, C] -> [B, N, C]. The mixer is the only part of a block that exchanges
    information between tokens.

    window: window size, if the mixer expects tokens sorted by window; None for row order.
    """

    window: Window | None = None

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]. Raises ValueError if N does not fit the grid."""
        raise NotImplementedError
