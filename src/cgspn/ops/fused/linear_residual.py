"""RMSNorm, a linear layer from a narrow latent, LayerScale and the residual, reading and writing the tokens once."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from ..gpu import Gpu, gpu_of
from ..replay import empty, empty_like, matmul
from ..triton_launch import TritonLaunch
from .rows import column_sums, layer_norm_launch, rms_backward
from .tiles import PARTS, is_large, plain_gradients, tile, weight_channels


@functools.lru_cache(maxsize=512)
def _fold_launch(gpu: Gpu | None, dtypes: tuple[torch.dtype | None, ...], channels: int, latent: int) -> TritonLaunch:
    from . import kernels

    _, gain, _, scale, after, _ = dtypes
    return TritonLaunch(
        kernels.linear_residual_fold, gpu, (-(-channels // 16),), (channels, latent),
        CHANNELS=16, LATENT=tile(latent), NORM=gain is not None, SCALE=scale is not None, NEXT=after is not None,
        num_warps=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _forward_launch(
    gpu: Gpu | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: int,
    channels: int,
    latent: int,
    eps: float,
    norm: bool,
) -> TritonLaunch:
    """Its tiles are the fastest on an H100 for a thousand to 175 thousand rows of 1152 channels."""
    from . import kernels

    dtype, wide = dtypes[1], tile(latent)
    most = max(16, (1 << 16) // (wide * dtype.itemsize))  # y in at most 64 KB
    large = is_large(gpu, dtypes[0]) and dtype.itemsize < 4 and rows >= 128 * PARTS
    size = min(128 if large else 64, most)
    chunk = weight_channels(latent, dtype, 1 << 15)
    programs, chunks = -(-rows // size), -(-channels // chunk)
    # where rows are few, a program has some of the channels
    parts = max(1, min(chunks, PARTS // max(1, programs)))
    share = -(-chunks // parts) * chunk
    return TritonLaunch(
        kernels.linear_residual_forward, gpu, (programs * -(-channels // share),), (rows, channels, latent, share, eps),
        ROWS=size, LATENT=wide, CHANNELS=chunk, STAGES=3 if size == 128 else 2, NORM=norm, EVEN=channels % chunk == 0,
        num_warps=8 if size == 128 else 4,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _finish_launch(gpu: Gpu | None, dtypes: tuple[torch.dtype, ...], channels: int, latent: int) -> TritonLaunch:
    from . import kernels

    grid, numbers = (-(-latent // 16),), (channels, latent)
    return TritonLaunch(kernels.linear_residual_finish, gpu, grid, numbers, CHANNELS=64, LATENT=16, num_warps=4)


def _fold(
    gpu: Gpu | None,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor,
    scale: Tensor | None,
    after: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The linear layer with gain and LayerScale in it, [C, K] in `dtype`, and all that is added: float32 [C]."""
    folded = empty(weight.shape, dtype, weight.device)
    offset = empty(weight.shape[:1], torch.float32, weight.device)
    tensors = (weight.contiguous(), gain, bias, scale, after, folded)
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    _fold_launch(gpu, dtypes, *weight.shape)(*tensors, offset)
    return folded, offset


def forward(
    residual: Tensor,
    y: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    after: Tensor | None = None,
) -> Tensor:
    """residual + scale * linear(RMSNorm(y)) + after: residual [..., C], y [..., K] -> [..., C].

    gain [K], or None for no norm; weight [C, K]; bias [C]; scale [C] (LayerScale) or None; after [C] or None.
    """
    residual, y, gpu = residual.contiguous(), y.contiguous(), gpu_of(residual.device)
    channels, latent = weight.shape
    out = empty_like(residual)
    folded, offset = _fold(gpu, weight, gain, bias, scale, after, y.dtype)
    rows = residual.numel() // channels
    dtypes = (residual.dtype, y.dtype)
    launch = _forward_launch(gpu, dtypes, rows, channels, latent, eps, gain is not None)
    launch(residual, y, folded, offset, out)
    return out


def forward_norm(
    residual: Tensor,
    y: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    norm: tuple[Tensor, Tensor, float],
    after: Tensor,
) -> tuple[Tensor, Tensor]:
    """t = `forward(...)` and what the next half of a block wants of it: LayerNorm(t) and t + after, [..., C].

    norm: gain and shift [C] of the LayerNorm, and its eps; after: [C], the bias of the MLP's second layer.
    """
    out = forward(residual, y, gain, weight, bias, scale, eps, after)
    normal, channels = empty_like(out), out.shape[-1]
    dtypes = (out.dtype, norm[0].dtype, norm[1].dtype, after.dtype)
    launch = layer_norm_launch(gpu_of(out.device), dtypes, out.numel() // channels, channels, norm[2])
    launch(out, norm[0], norm[1], after, normal)
    return normal, out


def backward(
    dout: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients to y, gain [K], weight, bias and scale [C]; None for a gain or a scale that is not there."""
    d = dout.flatten(0, -2).to(y.dtype)
    folded, _ = _fold(gpu_of(y.device), weight, gain, bias, scale, None, y.dtype)
    dy, unit = matmul(d, folded).view(y.shape), y
    if gain is not None:
        unit = empty_like(y)
        dy, _, _ = rms_backward(dy, y, None, unit, eps)
    product = matmul(d.T, unit.reshape(-1, y.shape[-1]))  # [C, K]: all other gradients are sums of it
    if scale is None and gain is not None:
        dgain, dweight = (empty_like(t) for t in (gain, weight))
        finish = _finish_launch(gpu_of(y.device), (product.dtype, gain.dtype, weight.dtype), *weight.shape)
        finish(product, gain, weight.contiguous(), dgain, dweight)
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
    """The definition."""
    dtype = residual.dtype
    normal = y if gain is None else rms_norm(y, y.shape[-1:], gain.to(y.dtype), eps)
    branch = linear(normal.to(dtype), weight.to(dtype), bias.to(dtype))
    return residual + (branch if scale is None else branch * scale.to(dtype))


class LinearResidual(torch.autograd.Function):
    """`forward` without `after`."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        y: Tensor,
        gain: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        eps: float,
    ) -> Tensor:
        """-> [..., C]."""
        ctx.eps = eps
        ctx.save_for_backward(y, gain, weight, bias, scale)
        return forward(residual, y, gain, weight, bias, scale, eps)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable again, by way of the definition."""
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # the residual's own gradient is dout
            grads = plain_gradients(partial(plain, torch.zeros_like(dout), eps=ctx.eps), saved, dout)
            return dout, *grads, None
        y, gain, weight, bias, scale = saved
        return dout, *backward(dout, y, gain, weight, bias, scale, ctx.eps), None
