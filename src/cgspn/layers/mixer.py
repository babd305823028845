"""The one interface behind which attention, C-GSPN and GSPN are interchangeable."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

Window = tuple[int, int]  # rows and columns of positions


class Grid(NamedTuple):
    """Where tokens [B, prefix + height * width, C] lie: `prefix` class and register tokens, then the rows of the grid.

    `mask` [B, height, width] bool marks the positions inside the image; None means all of them. `window` names
    the windows in whose order the tokens of the batch lie (`window_attention`); None means rows.
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
    """Mixes tokens [B, N, C] over their grid and returns as many; the only part of a block that looks sideways.

    Attributes:
        window: the windows in whose order the mixer wants its tokens; None for rows.
    """

    window: Window | None = None

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]. Raises ValueError if N does not fit the grid."""
        raise NotImplementedError
