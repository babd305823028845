"""Registration of the fused pieces with torch.library: custom ops with fake, autograd and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

ROWS = 64  # of a tile that norm and P_down share: fewer are slower even where they leave most of a GPU idle
PARTS = 264  # programs that share the reduction over rows: two for each multiprocessor of the largest GPUs


def _tile(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _channels(latent: int, dtype: torch.dtype, most: int) -> int:
    """Channels of a tile of weights [channels, latent] of at most so many bytes, so that several fit on the chip."""
    return max(16, min(64, most // (_tile(latent) * dtype.itemsize)))


def _large(x: Tensor, generations: tuple[int, ...] = (9, 10)) -> bool:
    """Whether a program may take 200 KB of shared memory for tiles of 16 bits, which only these GPUs have."""
    return x.is_cuda and x.dtype.itemsize < 4 and torch.cuda.get_device_capability(x.device)[0] in generations


def _fold_down(
    gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The linear layer with the norm's gain in it, [K, C] in `dtype`; its sums, and what is added: float32 [K]."""
    from . import kernels

    latent, channels = weight.shape
    folded = torch.empty(latent, channels, dtype=dtype, device=weight.device)
    sums, offset = torch.empty(2, latent, dtype=torch.float32, device=weight.device)
    kernels.norm_linear_fold[(latent,)](
        gain, shift, weight.contiguous(), bias, folded, sums, offset, channels, CHANNELS=_tile(channels), num_warps=4
    )
    return folded, sums, offset


@torch.library.custom_op("cgspn::norm_linear", mutates_args=())
def norm_linear_op(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [..., K], and the mean and inverse deviation of each row, float32 [...]."""
    from . import kernels

    x = x.contiguous()
    latent, channels = weight.shape
    folded, sums, offset = _fold_down(gain, shift, weight, bias, x.dtype)
    out = x.new_empty(*x.shape[:-1], latent)
    means, inverses = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    rows, wide = means.numel(), _tile(latent)
    tile, chunk, warps = min(ROWS, (1 << 14) // wide), _channels(latent, x.dtype, 1 << 14), 4
    if tile * wide > 1 << 13:
        warps = 8
    if wide == 256 and rows >= 128 * PARTS and _large(x, (9,)):  # 0.26 instead of 0.31 ms; on an sm_100 it spills
        tile, chunk, warps = 128, 64, 8
    kernels.norm_linear_forward[((rows + tile - 1) // tile,)](
        x, folded, sums, offset, out, means, inverses, rows, channels, latent, eps,
        ROWS=tile, LATENT=wide, CHANNELS=chunk, EVEN=channels % chunk == 0,
        num_warps=warps, num_stages=4,
    )  # fmt: skip
    return out, means, inverses


@norm_linear_op.register_fake
def _(x, gain, shift, weight, bias, eps):  # type: ignore[no-untyped-def]
    row = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), row, torch.empty_like(row)


@torch.library.custom_op("cgspn::norm_linear_backward", mutates_args=())
def norm_linear_backward_op(
    dout: Tensor,
    past: Tensor | None,
    x: Tensor,
    out: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    means: Tensor,
    inverses: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x (plus `past`, the one that reaches it from elsewhere), gain, shift, weight and bias."""
    from . import kernels

    x, dout = x.contiguous(), dout.contiguous()
    latent, channels = weight.shape
    folded, sums, offset = _fold_down(gain, shift, weight, bias, x.dtype)
    dx, scaled = torch.empty_like(x), torch.empty_like(dout)
    rows, wide = means.numel(), _tile(latent)
    tile, chunk = min(ROWS, (1 << 13) // wide), _channels(latent, x.dtype, 1 << 14)
    programs = (rows + tile - 1) // tile
    parts = torch.empty(programs, 2, latent, dtype=torch.float32, device=x.device)
    kernels.norm_linear_backward[(programs,)](
        dout, out, x, None if past is None else past.contiguous(), folded, sums, offset, means, inverses,
        dx, scaled, parts, rows, channels, latent,
        ROWS=tile, LATENT=wide, CHANNELS=chunk, STAGES=2, EVEN=channels % chunk == 0, PAST=past is not None,
        num_warps=4,
    )  # fmt: skip
    total, along = parts.sum(0)
    # the norm's part of the weight's gradient, without the normalised tokens in memory
    product = (scaled.flatten(0, -2).T @ x.flatten(0, -2)).float() - along[:, None]
    dweight = product * gain.float() + total[:, None] * shift.float()
    dgain, dshift = (product * weight.float()).sum(0), total @ weight.float()
    grads = dgain.to(gain.dtype), dshift.to(shift.dtype), dweight.to(weight.dtype), total.to(bias.dtype)
    return dx, *grads


@norm_linear_backward_op.register_fake
def _(dout, past, x, out, gain, shift, weight, bias, means, inverses):  # type: ignore[no-untyped-def]
    return tuple(_like(t) for t in (x, gain, shift, weight, bias))


def _norm_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output)


def _norm_linear_backward(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    x, gain, shift, weight, bias, out, means, inverses = ctx.saved_tensors
    return *norm_linear_backward_op(dout, None, x, out, gain, shift, weight, bias, means, inverses), None


norm_linear_op.register_autograd(_norm_linear_backward, setup_context=_norm_linear_setup)


class NormLinearPast(torch.autograd.Function):
    """`norm_linear_op` and x itself: what flows back past the norm joins its gradient in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The output [..., K], and x."""
        out, means, inverses = norm_linear_op(x, gain, shift, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gain, shift, weight, bias, out, means, inverses)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, past: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `norm_linear_backward_op`."""
        x, gain, shift, weight, bias, out, means, inverses = ctx.saved_tensors
        if dout is None:
            return past, None, None, None, None, None
        return *norm_linear_backward_op(dout, past, x, out, gain, shift, weight, bias, means, inverses), None


def _fold_up(
    weight: Tensor, gain: Tensor | None, bias: Tensor, scale: Tensor | None, after: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The linear layer with gain and LayerScale in it, [C, K] in `dtype`, and all that is added: float32 [C]."""
    from . import kernels

    channels, latent = weight.shape
    folded = torch.empty(channels, latent, dtype=dtype, device=weight.device)
    offset = torch.empty(channels, dtype=torch.float32, device=weight.device)
    kernels.linear_residual_fold[((channels + 15) // 16,)](
        weight.contiguous(), gain, bias, scale, after, folded, offset, channels, latent,
        CHANNELS=16, LATENT=_tile(latent), NORM=gain is not None, SCALE=scale is not None, NEXT=after is not None,
        num_warps=4,
    )  # fmt: skip
    return folded, offset


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
    """Launch `linear_residual_forward`. following: where LayerNorm goes, its gain, shift, what is added after, eps.

    Its tiles are the fastest on an H100 for a thousand to 175 thousand rows of 1152 channels.
    """
    from . import kernels

    residual, y = residual.contiguous(), y.contiguous()
    channels, latent = weight.shape
    out = torch.empty_like(residual)
    normal, normal_gain, normal_shift, after, normal_eps = following or (None, None, None, None, 0.0)
    folded, offset = _fold_up(weight, gain, bias, scale, after, y.dtype)
    rows, wide = residual.numel() // channels, _tile(latent)
    most = max(16, (1 << 16) // (wide * y.dtype.itemsize))  # y in at most 64 KB
    tile = min(128 if _large(residual) and y.dtype.itemsize < 4 and rows >= 128 * PARTS else 64, most)
    chunk = _channels(latent, y.dtype, 1 << 15)
    programs, chunks = (rows + tile - 1) // tile, (channels + chunk - 1) // chunk
    # where rows are few, a program has some of the channels
    parts = max(1, min(chunks, PARTS // programs))
    share = (chunks + parts - 1) // parts * chunk
    kernels.linear_residual_forward[(programs * ((channels + share - 1) // share),)](
        residual, y, folded, offset, out, rows, channels, latent, share, eps,
        ROWS=tile, LATENT=wide, CHANNELS=chunk, STAGES=3 if tile == 128 else 2, NORM=gain is not None,
        EVEN=channels % chunk == 0, num_warps=8 if tile == 128 else 4,
    )  # fmt: skip
    if following is not None:
        kernels.layer_norm_forward[((rows + 1) // 2,)](
            out, normal_gain, normal_shift, after, normal, rows, channels, normal_eps,
            ROWS=2, CHANNELS=_tile(channels), num_warps=4,
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
    return _like(residual), _like(residual)


@linear_residual_op.register_fake
def _(residual, y, gain, weight, bias, scale, eps):  # type: ignore[no-untyped-def]
    return _like(residual)


def _rms_backward(
    dn: Tensor, y: Tensor, gain: Tensor | None, unit: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The gradient to y; with a gain the sums over rows for gain and bias, float32 [2, K], without the norm in `unit`.

    See `kernels.rms_backward`.
    """
    from . import kernels

    dn, y = dn.contiguous(), y.contiguous()
    latent = y.shape[-1]
    dy = torch.empty_like(y)
    rows, wide = y.numel() // latent, _tile(latent)
    tile = min(64, max(1, (1 << 13) // wide))
    programs = (rows + tile - 1) // tile
    parts = None if gain is None else torch.empty(programs, 2, latent, dtype=torch.float32, device=y.device)
    kernels.rms_backward[(programs,)](
        dn, y, gain, dy, unit, parts, rows, latent, eps, ROWS=tile, LATENT=wide, GAIN=gain is not None, num_warps=8
    )
    return dy, None if parts is None else parts.sum(0)


@torch.library.custom_op("cgspn::linear_residual_backward", mutates_args=())
def linear_residual_backward_op(
    dout: Tensor, y: Tensor, gain: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to y, gain [K], weight, bias and scale [C]; empty ones for a gain or a scale that is not there."""
    d = dout.flatten(0, -2).to(y.dtype)
    folded, _ = _fold_up(weight, gain, bias, scale, None, y.dtype)
    dunit = (d @ folded).view_as(y)
    if gain is None:
        dy, unit = dunit, y
    else:
        unit = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        dy, _ = _rms_backward(dunit, y, None, unit, eps)
    total = d.sum(0, dtype=torch.float32)
    product = (d.T @ unit.flatten(0, -2)).float()  # [C, K]: all other gradients are sums of it
    wide = weight.float()
    s, g = (None if t is None else t.float() for t in (scale, gain))
    scaled = product if s is None else product * s[:, None]
    normed = product if g is None else product * g
    dgain = total.new_empty(0) if gain is None else (scaled * wide).sum(0).to(gain.dtype)
    dscale = total.new_empty(0) if scale is None else ((normed * wide).sum(1) + bias.float() * total).to(scale.dtype)
    dweight = scaled if g is None else scaled * g
    dbias = total if s is None else total * s
    return dy, dgain, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True), dscale


@linear_residual_backward_op.register_fake
def _(dout, y, gain, weight, bias, scale, eps):  # type: ignore[no-untyped-def]
    empty = weight.new_empty(0, dtype=torch.float32)
    dgain, dscale = (empty.clone() if t is None else _like(t) for t in (gain, scale))
    return _like(y), dgain, _like(weight), _like(bias), dscale


def _linear_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gain, weight, bias, scale, ctx.eps = inputs
    ctx.save_for_backward(y, gain, weight, bias, scale)


def _linear_residual_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, gain, weight, bias, scale = ctx.saved_tensors
    dy, dgain, dweight, dbias, dscale = linear_residual_backward_op(dout, y, gain, weight, bias, scale, ctx.eps)
    return dout, dy, None if gain is None else dgain, dweight, dbias, None if scale is None else dscale, None


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
    # among the fastest tiles on an H100 for 32 x 74 x 74 positions, and of few registers: sixteen elements a thread
    wide = _tile(c)
    columns = max(2, min(16, 1024 // wide))
    kernels.local_norm_forward[(b * ((h + 1) // 2), (w + columns - 1) // columns)](
        x, kernel.contiguous(), bias, gain, _bytes(mask), out, h, w, c, eps,
        COLUMNS=columns, CHANNELS=wide, SIDE=kernel.shape[-1], BIAS=bias is not None, NORM=gain is not None,
        MASKED=mask is not None, FLIP=flip, num_warps=max(1, columns * wide // 512),
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
    if gain is None:
        d = dout.to(x.dtype).contiguous()
        dgain, dbias = torch.zeros(c, device=x.device), d.flatten(0, -2).sum(0, dtype=torch.float32)
    else:
        d, sums = _rms_backward(dout, _convolve(x, kernel, bias, None, eps, mask, False), gain, None, eps)
        assert sums is not None
        dgain, dbias = sums[0].clone(), sums[1].clone()  # outputs of an op share no memory
    dx = _convolve(d, kernel, None, None, eps, None, True)
    if mask is not None:
        dx = dx.masked_fill(~mask[..., None], 0.0)
    count = min(PARTS, b * h)
    parts = torch.empty(count, c, side * side, device=x.device)
    wide = min(64, _tile(c))
    kernels.local_kernel_gradient[(count, side, (c + wide - 1) // wide)](
        x.contiguous(), d, _bytes(mask), parts, b, h, w, c,
        COLUMNS=16, CHANNELS=wide, SIDE=side, TAPS=_tile(side, 1), MASKED=mask is not None, num_warps=4,
    )  # fmt: skip
    return dx, parts.sum(0).view_as(kernel).to(kernel.dtype), dbias, dgain


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
def _(dout_shape, past_shape, x_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * torch.Size(x_shape).numel() * dout_shape[-1]


@register_flop_formula(torch.ops.cgspn.linear_residual)
def _(residual_shape, y_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * torch.Size(residual_shape).numel() * y_shape[-1]


@register_flop_formula(torch.ops.cgspn.linear_residual_norm)
def _(residual_shape, y_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * torch.Size(residual_shape).numel() * y_shape[-1]


@register_flop_formula(torch.ops.cgspn.linear_residual_backward)
def _(dout_shape, y_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * torch.Size(dout_shape).numel() * y_shape[-1]


@register_flop_formula(torch.ops.cgspn.local_norm)
def _(x_shape, kernel_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * torch.Size(x_shape).numel() * kernel_shape[-1] ** 2


@register_flop_formula(torch.ops.cgspn.local_norm_backward)
def _(dout_shape, x_shape, kernel_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 3 * 2 * torch.Size(x_shape).numel() * kernel_shape[-1] ** 2
