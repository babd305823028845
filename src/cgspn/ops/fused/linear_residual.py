"""RMSNorm, a linear layer from the latent, LayerScale and the residual addition in one pass over the tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from ..gpu import gpu_of
from ..replay import empty, empty_like, matmul
from .rows import column_sums, layer_norm_past, rms_backward
from .tiles import PARTS, is_large, launch, plain_gradients, tile, weight_channels


def _fold(
    weight: Tensor, gain: Tensor | None, bias: Tensor, scale: Tensor | None, after: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fold gain and LayerScale into the linear layer: weight [C, K] in `dtype` and float32 bias [C]."""
    channels, latent = weight.shape
    folded, offset = empty(weight.shape, dtype, weight.device), empty((channels,), torch.float32, weight.device)
    launch(
        "linear_residual_fold", (weight.contiguous(), gain, bias, scale, after, folded, offset),
        (-(-channels // 16),), (channels, latent),
        CHANNELS=16, LATENT=tile(latent), NORM=gain is not None, SCALE=scale is not None, NEXT=after is not None,
        num_warps=4,
    )  # fmt: skip
    return folded, offset


def forward(
    residual: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float,
    after: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + scale * linear(RMSNorm(y)) + after: residual [..., C], y [..., K] -> [..., C].

    gain [K], or None for no norm; weight [C, K]; bias [C]; scale [C] (LayerScale) or None; after [C] or None.
    The tiles are the fastest on an H100 for one thousand to 175 thousand rows of 1152 channels.
    """
    residual, y = residual.contiguous(), y.contiguous()
    (channels, latent), dtype = weight.shape, y.dtype
    rows, wide = residual.numel() // channels, tile(latent)
    folded, offset = _fold(weight, gain, bias, scale, after, dtype)
    out = empty_like(residual)
    most = max(16, (1 << 16) // (wide * dtype.itemsize))  # y in at most 64 KB
    large = is_large(gpu_of(y.device), residual.dtype) and dtype.itemsize < 4 and rows >= 128 * PARTS
    size = min(128 if large else 64, most)
    chunk = weight_channels(latent, dtype, 1 << 15)
    programs, chunks = -(-rows // size), -(-channels // chunk)
    # with few rows, each program computes only some of the channels
    share = -(-chunks // max(1, min(chunks, PARTS // max(1, programs)))) * chunk
    launch(
        "linear_residual_forward", (residual, y, folded, offset, out), (programs * -(-channels // share),),
        (rows, channels, latent, share, eps), ROWS=size, LATENT=wide, CHANNELS=chunk, STAGES=3 if size == 128 else 2,
        NORM=gain is not None, EVEN=channels % chunk == 0, num_warps=8 if size == 128 else 4,
    )  # fmt: skip
    return out


def forward_norm(
    residual: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float,
    norm: tuple[Tensor, Tensor, float], after: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The inputs of the MLP half of a block: LayerNorm(t) and t + after, [..., C], for t = `forward(...)`.

    norm: gain and shift [C] of the LayerNorm, and its eps; after: [C], the bias of the MLP's second layer.
    """
    out = forward(residual, y, gain, weight, bias, scale, eps, after)
    return layer_norm_past(out, norm[0], norm[1], after, norm[2]), out


def backward(
    dout: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to y, gain [K], weight, bias and scale [C]; None if there is no gain or scale."""
    d = dout.flatten(0, -2).to(y.dtype)
    folded, _ = _fold(weight, gain, bias, scale, None, y.dtype)
    dy, unit = matmul(d, folded).view(y.shape), y
    if gain is not None:
        unit = empty_like(y)
        dy, _, _ = rms_backward(dy, y, None, unit, eps)
    product = matmul(d.T, unit.reshape(-1, y.shape[-1]))  # [C, K]; the other gradients are sums of it
    if scale is None and gain is not None:
        dgain, dweight = (empty_like(t) for t in (gain, weight))
        tensors, numbers = (product, gain, weight.contiguous(), dgain, dweight), weight.shape
        grid = (-(-weight.shape[1] // 16),)
        launch("linear_residual_finish", tensors, grid, tuple(numbers), CHANNELS=64, LATENT=16, num_warps=4)
        return dy, dgain, dweight, column_sums(d, dtype=bias.dtype), None
    total, product = d.sum(0, dtype=torch.float32), product.float()
    wide = weight.float()
    s, g = (None if t is None else t.float() for t in (scale, gain))
    scaled = product if s is None else product * s[:, None]
    normed = product if g is None else product * g
    gains = None if gain is None else (scaled * wide).sum(0).to(gain.dtype)
    dscale = None if scale is None else ((normed * wide).sum(1) + bias.float() * total).to(scale.dtype)
    dweight = scaled if g is None else scaled * g
    dbias = total if s is None else total * s
    return dy, gains, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale


def plain(
    residual: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> Tensor:
    """The same in plain PyTorch."""
    dtype = residual.dtype
    normal = y if gain is None else rms_norm(y, y.shape[-1:], gain.to(y.dtype), eps)
    branch = linear(normal.to(dtype), weight.to(dtype), bias.to(dtype))
    return residual + (branch if scale is None else branch * scale.to(dtype))


class LinearResidual(torch.autograd.Function):
    """The autograd function of `forward` without `after`."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor,
        scale: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        """-> [..., C]."""
        ctx.eps = eps
        ctx.save_for_backward(y, gain, weight, bias, scale)
        return forward(residual, y, gain, weight, bias, scale, eps)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; a second derivative goes through `plain`."""
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # the residual's gradient is dout
            grads = plain_gradients(partial(plain, torch.zeros_like(dout), eps=ctx.eps), saved, dout)
            return dout, *grads, None
        y, gain, weight, bias, scale = saved
        return dout, *backward(dout, y, gain, weight, bias, scale, ctx.eps), None
