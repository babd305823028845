"""A transformer block with any mixer, and the taps for distillation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import executor
from .mixer import Grid, Mixer
from .mlp import Activation, Mlp
from .norm import LayerNorm
from .state import State


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch: [..., C] -> [..., C]."""

    def __init__(self, width: int, init: float) -> None:
        """width: C; init: initial value of all factors."""
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x * self.gamma.to(x.dtype)


class Block(nn.Module):
    """x + scale1(mixer(norm1(x))), then x + scale2(mlp(norm2(x))): tokens [B, N, C] -> [B, N, C].

    executor.py decides which of these layers run fused. docs/paper.md describes the taps PP and PB.

    fusion_backend: "auto" uses fused kernels if they are faster and give the same result, "triton" even if they are
    slower, "torch" never.
    """

    fusion_backend: Literal["auto", "triton", "torch"] = "auto"

    def __init__(
        self, width: int, mixer: Mixer, hidden: int, act: Activation, eps: float, layer_scale: float | None
    ) -> None:
        """width: C; hidden: MLP width; eps: of both LayerNorms; layer_scale: initial value or None."""
        super().__init__()
        self._state: State | None = None
        self.norm1 = LayerNorm(width, eps=eps)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, act)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the cached analysis of the layers, which a copy must not share."""
        return vars(self) | {"_state": None}

    def forward(self, tokens: Tensor, grid: Grid, tapped: bool = False) -> Any:
        """tokens [B, N, C] -> [B, N, C]; if `tapped`, also the mixing branch (PP): a pair (PB, PP), both [B, N, C]."""
        return executor.run_block(self, tokens, grid, tapped)

    def tapped(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """tokens [B, N, C] -> the block's output (PB) and its mixing branch (PP), both [B, N, C]."""
        out: tuple[Tensor, Tensor] = self(tokens, grid, tapped=True)
        return out

    def sublayer(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Return the mixing branch [B, N, C] without the residual, which stage 1 trains."""
        return executor.run_branch(self, tokens, grid, executor.fusion_of(self, tokens))[0]

    def mixing_half(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens + mixing branch, [B, N, C]."""
        return executor.run_mixing_half(self, tokens, grid)

    def mlp_half(self, tokens: Tensor) -> Tensor:
        """tokens + MLP branch, [B, N, C]."""
        out: Tensor = tokens + self.scale2(self.mlp(self.norm2(tokens)))
        return out
