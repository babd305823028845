"""LayerNorm, then a linear layer to the latent, in one pass over the tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from ..gpu import gpu_of
from ..replay import empty, empty_like, matmul
from .rows import add_up
from .tiles import PARTS, ROWS, is_large, launch, plain_gradients, tile, weight_channels


def _fold(gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold the norm's gain into the linear layer: weight [K, C] in `dtype`; row sums and bias, float32 [2, K]."""
    latent, channels = weight.shape
    folded, sums = empty(weight.shape, dtype, weight.device), empty((2, latent), torch.float32, weight.device)
    tensors = (gain, shift, weight.contiguous(), bias, folded, sums)
    launch("norm_linear_fold", tensors, (latent,), (channels, latent), CHANNELS=tile(channels), num_warps=4)
    return folded, sums


def forward(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, save: bool = False
) -> tuple[Tensor, Tensor | None]:
    """linear(LayerNorm(x)): x [..., C] -> [..., K] in the dtype of x.

    gain, shift [C]; weight [K, C]; bias [K], of any floating dtype. save: also returns mean and inverse deviation of
    each row, float32 [2, M].
    """
    x, dtype = x.contiguous(), x.dtype
    latent, channels = weight.shape
    rows, wide = x.numel() // channels, tile(latent)
    folded, sums = _fold(gain, shift, weight, bias, dtype)
    out = empty((*x.shape[:-1], latent), dtype, x.device)
    statistics = empty((2, rows), torch.float32, x.device) if save else None
    size, chunk, warps = min(ROWS, (1 << 14) // wide), weight_channels(latent, dtype, 1 << 14), 4
    if size * wide > 1 << 13:
        warps = 8
    gpu = gpu_of(x.device)
    if wide == 256 and rows >= 128 * PARTS and is_large(gpu, dtype, (9,)):
        size, chunk, warps = 128, 64, 8  # 0.26 instead of 0.31 ms; on an sm_100 it spills
    launch(
        "norm_linear_forward", (x, folded, sums, out, statistics), (-(-rows // size),), (rows, channels, latent, eps),
        ROWS=size, LATENT=wide, CHANNELS=chunk, EVEN=channels % chunk == 0, SAVE=save,
        WAIT=gpu is not None and gpu.capability[0] == 9, num_warps=warps, num_stages=4,
    )  # fmt: skip
    return out, statistics


def backward(
    dout: Tensor, past: Tensor | None, x: Tensor, out: Tensor, gain: Tensor, shift: Tensor, weight: Tensor,
    bias: Tensor, statistics: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients with respect to x (plus `past`, its gradient from elsewhere), gain, shift, weight and bias."""
    x, dout, past = x.contiguous(), dout.contiguous(), None if past is None else past.contiguous()
    (latent, channels), rows = weight.shape, statistics.shape[1]
    folded, sums = _fold(gain, shift, weight, bias, x.dtype)
    wide, chunk = tile(latent), weight_channels(latent, x.dtype, 1 << 14)
    size = min(ROWS, (1 << 13) // wide)
    programs = -(-rows // size)
    dx, scaled, parts = empty_like(x), empty_like(dout), empty((programs, 2, latent), torch.float32, x.device)
    launch(
        "norm_linear_backward", (dout, out, x, past, folded, sums, statistics, dx, scaled, parts), (programs,),
        (rows, channels, latent), ROWS=size, LATENT=wide, CHANNELS=chunk, STAGES=2, EVEN=channels % chunk == 0,
        PAST=past is not None, num_warps=4,
    )  # fmt: skip
    # the norm's part of the weight gradient, without storing the normalised tokens
    product = matmul(scaled.view(-1, latent).T, x.view(-1, channels))
    grads = [empty_like(t) for t in (gain, shift, weight, bias)]
    tensors = (product, add_up(parts), gain, shift, weight.contiguous(), *grads)
    grid, numbers = (-(-channels // 32),), (channels, latent)
    launch("norm_linear_finish", tensors, grid, numbers, CHANNELS=32, LATENT=32, num_warps=4)
    return dx, *grads


def plain(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same in plain PyTorch."""
    normal = layer_norm(x, x.shape[-1:], gain.to(x.dtype), shift.to(x.dtype), eps)
    return linear(normal, weight.to(x.dtype), bias.to(x.dtype))


class NormLinear(torch.autograd.Function):
    """The autograd function of `forward` that also returns x, so that one pass adds both gradients of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The output [..., K], and x."""
        out, statistics = forward(x, gain, shift, weight, bias, eps, save=True)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gain, shift, weight, bias, out, statistics)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, past: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients; a second derivative goes through `plain`."""
        *inputs, out, statistics = ctx.saved_tensors
        if dout is None:
            return past, None, None, None, None, None
        if torch.is_grad_enabled():
            dx, *grads = plain_gradients(partial(plain, eps=ctx.eps), inputs, dout)
            return dx if past is None else past if dx is None else dx + past, *grads, None
        x, gain, shift, weight, bias = inputs
        return *backward(dout, past, x, out, gain, shift, weight, bias, statistics), None
