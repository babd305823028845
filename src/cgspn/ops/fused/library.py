"""Registration of the fused pieces with torch.library: custom ops with fake, autograd and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import definition

PARTS = 264  # programs that share the reduction over rows: two for each multiprocessor of the largest GPUs


def _tile(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _rows(count: int) -> int:
    """Rows of a tile: enough programs for a whole GPU come before large tiles."""
    return 64 if count >= 64 * PARTS else 32 if count >= 32 * PARTS else 16


@torch.library.custom_op("cgspn::norm_linear", mutates_args=())
def norm_linear_op(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [..., K], and the mean and inverse deviation of each row, float32 [...]."""
    from . import kernels

    x = x.contiguous()
    latent, channels = weight.shape
    out = x.new_empty(*x.shape[:-1], latent)
    means, inverses = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    rows = means.numel()
    tile = _rows(rows)
    kernels.norm_linear_forward[((rows + tile - 1) // tile,)](
        x, gain, shift, weight.contiguous(), bias, out, means, inverses, rows, channels, latent, eps,
        ROWS=tile, LATENT=_tile(latent), CHANNELS=64, SAVE=True, num_warps=4,
    )  # fmt: skip
    return out, means, inverses


@norm_linear_op.register_fake
def _(x, gain, shift, weight, bias, eps):  # type: ignore[no-untyped-def]
    row = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), row, torch.empty_like(row)


@torch.library.custom_op("cgspn::norm_linear_backward", mutates_args=())
def norm_linear_backward_op(
    dout: Tensor,
    x: Tensor,
    out: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    means: Tensor,
    inverses: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, gain, shift, weight and bias."""
    from . import kernels

    x, dout = x.contiguous(), dout.contiguous()
    latent, channels = weight.shape
    wide, g, s = weight.float(), gain.float(), shift.float()
    # what the kernel multiplied by, rounded as it was
    weights = (wide * g).to(x.dtype).float().sum(1)
    offset = wide @ s + bias.float()
    dx = torch.empty_like(x)
    rows = means.numel()
    tile = _rows(rows)
    kernels.norm_linear_backward[((rows + tile - 1) // tile,)](
        dout, out, x, gain, weight.contiguous(), offset, weights, means, inverses, dx, rows, channels, latent,
        ROWS=tile, LATENT=_tile(latent), CHANNELS=64, num_warps=4,
    )  # fmt: skip
    d = dout.flatten(0, -2)
    scaled = d.float() * inverses.reshape(-1, 1)
    # the norm's part of the weight's gradient, without the normalised tokens in memory
    product = (scaled.to(x.dtype).T @ x.flatten(0, -2)).float() - (scaled * means.reshape(-1, 1)).sum(0)[:, None]
    total = d.float().sum(0)
    dweight = product * g + total[:, None] * s
    grads = (product * wide).sum(0).to(gain.dtype), (total @ wide).to(shift.dtype), dweight.to(weight.dtype)
    return dx, *grads, total.to(bias.dtype)


@norm_linear_backward_op.register_fake
def _(dout, x, out, gain, shift, weight, bias, means, inverses):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (x, gain, shift, weight, bias))


def _norm_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output)


def _norm_linear_backward(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    x, gain, shift, weight, bias, out, means, inverses = ctx.saved_tensors
    return *norm_linear_backward_op(dout, x, out, gain, shift, weight, bias, means, inverses), None


norm_linear_op.register_autograd(_norm_linear_backward, setup_context=_norm_linear_setup)


def _onto(
    residual: Tensor,
    y: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    following: tuple[Tensor, Tensor, Tensor, Tensor, float] | None,
) -> Tensor:
    """Launch `linear_residual_forward`. following: where LayerNorm goes, its gain, shift, what is added after, eps."""
    from . import kernels

    residual, y = residual.contiguous(), y.contiguous()
    channels, latent = weight.shape
    out = torch.empty_like(residual)
    normal, normal_gain, normal_shift, after, normal_eps = following or (None, None, None, None, 0.0)
    rows = residual.numel() // channels
    tile = _rows(rows)
    kernels.linear_residual_forward[((rows + tile - 1) // tile,)](
        # weights in the dtype of the product: a float32 tile of them would fill the shared memory
        residual, y, gain, weight.to(y.dtype).contiguous(), bias, scale, out, normal, normal_gain, normal_shift, after,
        rows, channels, latent, eps, normal_eps, ROWS=tile, LATENT=_tile(latent),
        CHANNELS=64 if latent <= 256 else 32, NORM=gain is not None, SCALE=scale is not None,
        NEXT=following is not None, num_warps=8 if tile == 64 else 4, num_stages=2,
    )  # fmt: skip
    return out


@torch.library.custom_op("cgspn::linear_residual", mutates_args=())
def linear_residual_op(
    residual: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> Tensor:
    """See `linear_residual`."""
    return _onto(residual, y, gain, weight, bias, scale, eps, None)


@torch.library.custom_op("cgspn::linear_residual_norm", mutates_args=())
def linear_residual_norm_op(
    residual: Tensor,
    y: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    normal_gain: Tensor,
    normal_shift: Tensor,
    after: Tensor,
    normal_eps: float,
) -> tuple[Tensor, Tensor]:
    """See `linear_residual_norm`."""
    normal = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    following = (normal, normal_gain, normal_shift, after, normal_eps)
    return _onto(residual, y, gain, weight, bias, scale, eps, following), normal


@linear_residual_norm_op.register_fake
def _(residual, y, gain, weight, bias, scale, eps, normal_gain, normal_shift, after, normal_eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(residual), torch.empty_like(residual)


@linear_residual_op.register_fake
def _(residual, y, gain, weight, bias, scale, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(residual)


def _linear_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gain, weight, bias, scale, ctx.eps = inputs
    ctx.save_for_backward(y, gain, weight, bias, scale)


def _linear_residual_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, gain, weight, bias, scale = ctx.saved_tensors
    d, dtype = dout.flatten(0, -2), dout.dtype
    normal = y if gain is None else torch.nn.functional.rms_norm(y, y.shape[-1:], gain.to(y.dtype), ctx.eps)
    total = d.sum(0, dtype=torch.promote_types(dtype, torch.float32))
    product = (d.T @ normal.flatten(0, -2).to(dtype)).to(total.dtype)  # [C, K]
    dscale = None
    matrix = weight.to(dtype)
    dweight, dbias = product, total
    if scale is not None:
        dscale = ((weight * product).sum(1) + bias * total).to(scale.dtype)
        dweight, dbias = product * scale[:, None], total * scale
        matrix = (weight * scale[:, None]).to(dtype)
    dnormal = dout @ matrix
    dgain = None
    if gain is None:
        dy = dnormal
    else:
        dy, dgain = definition.rms_norm_backward(dnormal, y, gain, ctx.eps)
        dgain = dgain.to(gain.dtype)
    return dout, dy.to(y.dtype), dgain, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale, None


linear_residual_op.register_autograd(_linear_residual_backward, setup_context=_linear_residual_setup)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _convolve(
    x: Tensor, kernel: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float, mask: Tensor | None, flip: bool
) -> Tensor:
    from . import kernels

    x = x.contiguous()
    b, h, w, c = x.shape
    out = torch.empty_like(x)
    columns = 16 if c > 64 else 32
    kernels.local_norm_forward[(b * h, (w + columns - 1) // columns)](
        x, kernel.contiguous(), bias, gain, _bytes(mask), out, h, w, c, eps,
        COLUMNS=columns, CHANNELS=_tile(c), SIDE=kernel.shape[-1], BIAS=bias is not None, NORM=gain is not None,
        MASKED=mask is not None, FLIP=flip, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("cgspn::local_norm", mutates_args=())
def local_norm_op(
    x: Tensor, kernel: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float, mask: Tensor | None
) -> Tensor:
    """See `local_norm`."""
    return _convolve(x, kernel, bias, gain, eps, mask, False)


@local_norm_op.register_fake
def _(x, kernel, bias, gain, eps, mask):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("cgspn::local_norm_backward", mutates_args=())
def local_norm_backward_op(
    dout: Tensor, x: Tensor, kernel: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, kernel, bias [C] and gain [C] (zeros for a norm that is not there)."""
    from . import kernels

    b, h, w, c = x.shape
    side = kernel.shape[-1]
    dgain = torch.zeros(c, device=x.device)
    d = dout
    if gain is not None:
        d, dgain = definition.rms_norm_backward(dout, _convolve(x, kernel, bias, None, eps, mask, False), gain, eps)
    d = d.to(x.dtype).contiguous()
    dx = _convolve(d, kernel, None, None, eps, None, True)
    if mask is not None:
        dx = dx.masked_fill(~mask[..., None], 0.0)
    count = min(PARTS, b * h)
    parts = torch.empty(count, c, side * side, device=x.device)
    kernels.local_kernel_gradient[(count,)](
        x.contiguous(), d, _bytes(mask), parts, b, h, w, c,
        COLUMNS=16 if c > 64 else 32, CHANNELS=_tile(c), SIDE=side, MASKED=mask is not None, num_warps=4,
    )  # fmt: skip
    return dx, parts.sum(0).view_as(kernel).to(kernel.dtype), d.flatten(0, -2).sum(0, dtype=torch.float32), dgain


@local_norm_backward_op.register_fake
def _(dout, x, kernel, bias, gain, eps, mask):  # type: ignore[no-untyped-def]
    vector = x.new_empty(x.shape[-1], dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(kernel), vector, torch.empty_like(vector)


def _local_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, mask = inputs
    ctx.save_for_backward(*tensors, mask)


def _local_norm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel, bias, gain, mask = ctx.saved_tensors
    dx, dkernel, dbias, dgain = local_norm_backward_op(dout, x, kernel, bias, gain, ctx.eps, mask)
    wanted_bias = None if bias is None else dbias.to(bias.dtype)
    return dx, dkernel, wanted_bias, None if gain is None else dgain.to(gain.dtype), None, None


local_norm_op.register_autograd(_local_norm_backward, setup_context=_local_norm_setup)


@register_flop_formula(torch.ops.cgspn.norm_linear)
def _(x_shape, gain_shape, shift_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@register_flop_formula(torch.ops.cgspn.norm_linear_backward)
def _(dout_shape, x_shape, out_shape_, gain_shape, shift_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * torch.Size(x_shape).numel() * weight_shape[0]


@register_flop_formula(torch.ops.cgspn.linear_residual)
def _(residual_shape, y_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * torch.Size(residual_shape).numel() * y_shape[-1]


@register_flop_formula(torch.ops.cgspn.local_norm)
def _(x_shape, kernel_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * torch.Size(x_shape).numel() * kernel_shape[-1] ** 2


@register_flop_formula(torch.ops.cgspn.local_norm_backward)
def _(dout_shape, x_shape, kernel_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 3 * 2 * torch.Size(x_shape).numel() * kernel_shape[-1] ** 2
