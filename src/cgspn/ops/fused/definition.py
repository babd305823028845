"""The definitions, in plain PyTorch: right on every device and dtype, differentiable twice. The kernels equal them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, linear, rms_norm


def norm_linear(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm, then a linear layer: x [..., C] -> [..., K]. gain, shift [C]; weight [K, C]; bias [K]."""
    dtype = x.dtype
    normal = layer_norm(x, x.shape[-1:], gain.to(dtype), shift.to(dtype), eps)
    return linear(normal, weight.to(dtype), bias.to(dtype))


def local_norm(
    x: Tensor, kernel: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, mask: Tensor | None
) -> Tensor:
    """x plus a depthwise convolution of it, then RMSNorm: [B, H, W, C] -> the same.

    kernel [C, 1, k, k] (k odd) and bias [C], or None for no convolution; gain [C], or None for no norm; mask [B, H, W],
    False where x is taken as zero.
    """
    if kernel is not None:
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        offset = None if bias is None else bias.to(x.dtype)
        pad = kernel.shape[-1] // 2
        near = conv2d(x.permute(0, 3, 1, 2), kernel.to(x.dtype), offset, padding=pad, groups=x.shape[-1])
        x = x + near.permute(0, 2, 3, 1)
    return x if gain is None else rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)


def linear_residual(
    residual: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> Tensor:
    """residual + scale * linear(RMSNorm(y)): residual [..., C], y [..., K] -> [..., C].

    gain [K], or None for no norm; weight [C, K]; bias [C]; scale [C] (LayerScale), or None.
    """
    dtype = residual.dtype
    normal = y if gain is None else rms_norm(y, y.shape[-1:], gain.to(y.dtype), eps)
    branch = linear(normal.to(dtype), weight.to(dtype), bias.to(dtype))
    return residual + (branch if scale is None else branch * scale.to(dtype))
