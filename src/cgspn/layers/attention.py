"""Softmax attention over all tokens, for teachers, ViT students and the attention layers of a hybrid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..compat import in_forward_ad
from .mixer import Grid, Mixer
from .rotary import rotary_angles, rotate


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of attention. heads: number of heads, a divisor of the width. qkv_bias: whether the QKV projection has a
    bias.

    rotary: base of DINOv3's rotary position embeddings; None disables them.
    """

    heads: int = 16
    qkv_bias: bool = True
    rotary: float | None = None


class AttentionMixer(Mixer):
    """Multi-head self-attention: tokens [B, prefix + h*w, C] -> the same shape. Quadratic in the number of tokens."""

    def __init__(self, width: int, config: AttentionConfig | None = None) -> None:
        """width: channels per token. Raises ValueError if it is not a multiple of the number of heads."""
        super().__init__()
        self.config = config = config or AttentionConfig()
        if config.heads < 1 or width % config.heads:
            raise ValueError(f"heads is {config.heads}; a width of {width} accepts its divisors")
        if config.rotary is not None and (config.rotary <= 0 or width // config.heads % 4):
            raise ValueError(f"rotary is {config.rotary}; accepted: above 0, with heads of a multiple of 4 channels")
        self.heads, self.head_width = config.heads, width // config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.out = nn.Linear(width, width)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=0.5 * width**-0.5)
        for bias in (self.qkv.bias, self.out.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _split(self, tokens: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, heads, N, d] each. The grid gives the rotary positions."""
        batch, count, _ = tokens.shape
        q, k, v = self.qkv(tokens).view(batch, count, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4).unbind(0)
        if grid is not None and self.config.rotary is not None:
            angles = rotary_angles(grid, self.head_width, self.config.rotary, tokens.device)
            q, k = rotate(q, angles, grid.prefix), rotate(k, angles, grid.prefix)
        return q, k, v

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]; positions outside the grid's mask are not attended to."""
        q, k, v = self._split(tokens, grid)
        result: Tensor = self.out(attend(q, k, v, self.visible(tokens, grid)).transpose(1, 2).flatten(2))
        return result

    def with_map(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the output of `forward` and the attention map: [B, N, C] and [B, heads, N, N], with gradients."""
        q, k, v = self._split(tokens, grid)
        weights = _softmax(q, k, self.visible(tokens, grid))
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    @torch.no_grad()
    def weights(self, tokens: Tensor, grid: Grid, rows: Tensor | None = None) -> Tensor:
        """Return the attention map for visualisation: [B, heads, N, N], with rows that sum to one.

        rows: int64 [R], indices of the rows to return, as [B, heads, R, N]; None for all.
        """
        q, k, _ = self._split(tokens, grid)
        return _softmax(q if rows is None else q[:, :, rows], k, self.visible(tokens, grid, rows))

    def visible(self, tokens: Tensor, grid: Grid, rows: Tensor | None = None) -> Tensor | None:
        """[B, 1, 1 or R, N] bool: the tokens to which each of `rows` (as in `weights`) may attend; None for all."""
        if grid.mask is None:
            return None
        prefix = grid.mask.new_ones(tokens.shape[0], grid.prefix)
        return torch.cat([prefix, grid.mask.flatten(1)], 1)[:, None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of queries [B, heads, R, d] to keys and values [B, heads, N, d] -> [B, heads, R, d].

    visible: see `AttentionMixer`. PyTorch's kernels do not support forward-mode AD.
    """
    if in_forward_ad():
        return _softmax(q, k, visible) @ v
    return scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _softmax(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """[B, heads, R, d] and [B, heads, N, d] -> [B, heads, R, N], rows sum to one. visible: see `AttentionMixer`."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits if visible is None else logits.masked_fill(~visible, -torch.inf)).softmax(-1)
