"""Blocks for timm: stochastic depth in training, and a module that gives hooks the feature map."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Block, Grid
from ..layers.plain import has_no_hooks


class TimmBlock(Block):
    """A `Block` with what timm's blocks have besides.

    Attributes:
        drop_path: in training, the share of images that skip each half of the block; the others count for them.
        map: a module through which the block's map [B, C, h, w] passes, for hooks.
    """

    drop_path = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Block`."""
        super().__init__(*args, **kwargs)
        self.map = nn.Identity()

    def forward(self, tokens: Tensor, grid: Grid, tapped: bool = False) -> Any:
        """As of `Block`."""
        if self.training and self.drop_path:
            branch = self._dropped(self.sublayer(tokens, grid))
            tokens = tokens + branch
            tokens = tokens + self._dropped(self.scale2(self.mlp(self.norm2(tokens))))
            out = (tokens, branch) if tapped else tokens
        else:
            out = super().forward(tokens, grid, tapped)
            tokens = out[0] if tapped else out
        if not has_no_hooks(self.map):
            self.map(tokens[:, grid.prefix :].mT.unflatten(2, (grid.height, grid.width)))
        return out

    def _dropped(self, branch: Tensor) -> Tensor:
        """A branch [B, N, C], zero for the images that skip it, larger for the others so that the mean stays."""
        kept = 1.0 - self.drop_path
        return branch * torch.empty_like(branch[:, :1, :1]).bernoulli_(kept) / kept
