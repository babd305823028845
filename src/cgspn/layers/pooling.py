"""Pooling of tokens to one vector: attention pooling with a learned probe (SigLIP's MAP head), mean, or class token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .attention import attend
from .mixer import Grid
from .mlp import Activation, Mlp
from .norm import LayerNorm

Pooling = Literal["map", "mean", "cls"]


class MeanPool(nn.Module):
    """The mean of the grid tokens inside the mask: tokens [B, N, C] -> [B, C]."""

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Prefix tokens are ignored."""
        tokens = tokens[:, grid.prefix :]
        if grid.mask is None:
            return tokens.mean(1)
        inside = grid.mask.flatten(1)[..., None]
        return tokens.masked_fill(~inside, 0.0).sum(1) / inside.sum(1).clamp(min=1)


class ClassTokenPool(nn.Module):
    """Select the class token, or concatenate several summary tokens: tokens [B, N, C] -> [B, C * len(summary)]."""

    def __init__(self, summary: tuple[int, ...] = (0,)) -> None:
        """summary: indices of prefix tokens."""
        super().__init__()
        self.summary = summary

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Raises ValueError if the tokens have no class token."""
        if not grid.prefix:
            raise ValueError("pooling is 'cls' but the tokens have no class token; accepted: 'map', 'mean'")
        return tokens[:, 0] if self.summary == (0,) else tokens[:, list(self.summary)].flatten(1)


class MapPool(nn.Module):
    """A learned probe attends to the grid, then an MLP refines it: tokens [B, N, C] -> [B, C]. As in SigLIP."""

    def __init__(self, width: int, heads: int, hidden: int, act: Activation, eps: float) -> None:
        """width: C; heads: number of heads; hidden: MLP width. Raises ValueError if `heads` does not divide C."""
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads is {heads}; a width of {width} accepts its divisors")
        self.heads = heads
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, act)
        for linear in (self.q, self.kv, self.out):
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Prefix tokens and positions outside the mask are ignored."""
        tokens = tokens[:, grid.prefix :]
        batch, count, width = tokens.shape
        each = width // self.heads
        probe = torch.stack([self.probe])  # copied: in inference mode hooks treat a view as having a gradient
        q = self.q(probe).view(1, self.heads, 1, each).expand(batch, -1, -1, -1)
        k, v = self.kv(tokens).view(batch, count, 2, self.heads, each).permute(2, 0, 3, 1, 4).unbind(0)
        inside = None if grid.mask is None else grid.mask.flatten(1)[:, None, None]
        pooled = self.out(attend(q, k, v, inside).reshape(batch, width))
        out: Tensor = pooled + self.mlp(self.norm(pooled))
        return out
