"""The one interface behind which attention, C-GSPN and GSPN are interchangeable."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .norm import add_norm

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

    def branch(self, tokens: Tensor, norm: nn.Module, grid: Grid) -> tuple[Tensor, Tensor]:
        """mixer(norm(tokens)), and the tokens for what goes past it (`add_norm`): [B, N, C] each.

        Mixers that can begin before the norm has ended override this.
        """
        normal, past = add_norm(norm, tokens)
        return self(normal, grid), past

    def residual(self, tokens: Tensor, norm: nn.Module, scale: nn.Module, grid: Grid) -> Tensor:
        """The whole mixing half of a block, tokens + scale(mixer(norm(tokens))): [B, N, C] -> [B, N, C].

        Mixers that can read and write the tokens once override this.
        """
        branch, tokens = self.branch(tokens, norm, grid)
        out: Tensor = tokens + scale(branch)
        return out

    def residual_norm(
        self, tokens: Tensor, norm: nn.Module, scale: nn.Module, grid: Grid, following: nn.Module, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`residual`, and what the MLP half wants of it: (t + after, following(t)), [B, N, C] each.

        following: the LayerNorm of the next half; after: [C]. The first may be written to.
        """
        branch, tokens = self.branch(tokens, norm, grid)
        normal, total = add_norm(following, tokens, scale(branch), after)
        return total, normal
