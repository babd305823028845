"""Blocks for timm with stochastic depth, and with a module for hooks on the feature map."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Block, Grid
from ..layers.plain import has_no_hooks


class TimmBlock(Block):
    """A `Block` with the additional features of timm's blocks.

    drop_path: in training, the fraction of images that skip each half of the block; the others are scaled up. map: an
    identity module that is called with the block's map [B, C, h, w], for hooks.
    """

    drop_path = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `Block`."""
        super().__init__(*args, **kwargs)
        self.map = nn.Identity()

    def forward(self, tokens: Tensor, grid: Grid, tapped: bool = False) -> Any:
        """See `Block`."""
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
        """A branch [B, N, C] with stochastic depth: zero for images that skip it, scaled up for the others."""
        kept = 1.0 - self.drop_path
        return branch * torch.empty_like(branch[:, :1, :1]).bernoulli_(kept) / kept
