"""A transformer block around any mixer, cut where distillation taps it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.autocast import lowered
from .mixer import Grid, Mixer
from .mlp import Activation, Mlp, unheard
from .norm import LayerNorm, add_norm


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch: [..., C] -> [..., C]."""

    def __init__(self, width: int, init: float) -> None:
        """width: C; init: where every factor starts."""
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x * self.gamma.to(x.dtype)


class Block(nn.Module):
    """x + sublayer(x), then + MLP: tokens [B, N, C] -> [B, N, C].

    `sublayer` is what stage 1 aligns and the PP tap reads (the branch, before the residual is added); the block's
    output is what the PB tap reads. Source: "Key Designs" 3.

    Attributes:
        epilogues: in inference, let the MLP's products add bias and residual and take the GELU (`Mlp.onto`) wherever
            it can; None for on a GPU, where that is faster.
    """

    epilogues: bool | None = None

    def __init__(
        self, width: int, mixer: Mixer, hidden: int, act: Activation, eps: float, layer_scale: float | None
    ) -> None:
        """width: C; hidden: MLP width; eps: of both LayerNorms; layer_scale: initial value, None for none."""
        super().__init__()
        self.norm1 = LayerNorm(width, eps=eps)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, act)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def sublayer(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The mixing branch [B, N, C], without the residual."""
        out: Tensor = self.scale1(self.mixer.branch(tokens, self.norm1, grid)[0])
        return out

    def mlp_half(self, tokens: Tensor) -> Tensor:
        """tokens + MLP branch, [B, N, C]."""
        normal, tokens = add_norm(self.norm2, tokens)
        out: Tensor = tokens + self.scale2(self.mlp(normal))
        return out

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]."""
        if self.in_place(tokens):
            after = self.mlp.fc2.bias
            mixed, normal = self.mixer.residual_norm(tokens, self.norm1, self.scale1, grid, self.norm2, after)
            return self.mlp.onto(normal, mixed)
        return self.mlp_half(self.mixer.residual(tokens, self.norm1, self.scale1, grid))

    def in_place(self, tokens: Tensor) -> bool:
        """Whether the MLP's products write onto the residual, in inference."""
        # a program that is traced keeps the plain layers, which every exporter knows
        default = tokens.is_cuda and not torch.compiler.is_compiling()
        wanted = default if self.epilogues is None else self.epilogues
        bare = isinstance(self.scale2, nn.Identity) and unheard(self.mlp, self.norm2, self.scale2)
        if not wanted or not bare or torch.is_grad_enabled():
            return False
        # an MLP in 8 bits has an `onto` of its own
        return self.mlp.fits(tokens) if isinstance(self.mlp, Mlp) else lowered(tokens) in (None, tokens.dtype)

    def tapped(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """tokens [B, N, C] -> the block's output (PB) and its mixing branch (PP), both [B, N, C]."""
        branch, tokens = self.mixer.branch(tokens, self.norm1, grid)
        branch = self.scale1(branch)
        if self.in_place(tokens):
            normal, mixed = add_norm(self.norm2, tokens, branch, self.mlp.fc2.bias)
            return self.mlp.onto(normal, mixed), branch
        normal, mixed = add_norm(self.norm2, tokens, branch)
        return mixed + self.scale2(self.mlp(normal)), branch
