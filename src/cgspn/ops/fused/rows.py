"""Residual addition with LayerNorm, and the gradients of RMSNorm and GELU with the sums over rows for gains and biases.
Each reads and writes its tensors once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from ..backends import unsupported_reason
from ..eager import is_eager
from ..gpu import on_accelerator
from ..replay import empty, empty_like
from .tiles import launch, tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_MOST = 4096  # most channels of a row that stays on the chip
SMALL = 1 << 23  # with fewer elements, tiles are smaller
PROGRAMS = 528  # programs that share the sums over rows: four per SM of the largest GPUs
MODES = {None: 0, "none": 1, "tanh": 2}  # the kernels' code for each kind of GELU
# For plain sums and for the gradient of each GELU: tile widths, elements of a tile in 16 bits, warps, loop stages and
# programs. These are the fastest on an H100 for 47 thousand rows of 1152 and 4304 channels.
TILES: dict[str | None, tuple[tuple[int, ...], int, int, int, int]] = {
    None: ((128,), 2048, 2, 3, 2 * PROGRAMS),
    "none": ((128,), 1024, 2, 3, 2 * PROGRAMS),
    "tanh": ((512, 256, 128), 8192, 8, 3, 4 * PROGRAMS),
}


def can_use_rows(*tensors: Tensor | None) -> bool:
    """Whether the kernels of this module can run on these tensors: in eager mode, on a device that Triton supports.

    Kernels over whole rows take at most `CHANNELS_MOST` channels.
    """
    given = [t for t in tensors if t is not None]
    first = given[0]
    if not on_accelerator(first) or not is_eager(*given) or any(t.dtype not in DTYPES or not t.numel() for t in given):
        return False
    return unsupported_reason("triton", first) is None


def add_up(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum float32 `parts` [P, ...] over the first dimension in a fixed order. The other dimensions must be
    contiguous.
    """
    count, channels = parts.shape[0], parts.shape[1:].numel()
    out = empty(parts.shape[1:], dtype, parts.device)
    numbers = (count, parts.stride(0), channels)
    launch("add_up", (parts, out), (-(-channels // 64),), numbers, CHANNELS=64, STEP=32, num_warps=4)
    return out


def gelu(x: Tensor, approximate: str) -> Tensor:
    """`torch.nn.functional.gelu` of a contiguous x."""
    out, count = empty_like(x), x.numel()
    launch("gelu", (x, out), (-(-count // 4096),), (count,), BLOCK=4096, GELU=MODES[approximate], num_warps=8)
    return out


def forward(
    x: Tensor, branch: Tensor | None, gain: Tensor, shift: Tensor, eps: float, after: Tensor | None = None, *,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """LayerNorm(t) and t + after for t = x + branch, [..., C] in the dtype of x. Returns x itself if nothing is added.

    With `save`, also returns mean and inverse deviation of each row, float32 [M, 2].
    """
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    channels, wide = x.shape[-1], tile(x.shape[-1])
    rows, kept = x.numel() // channels, branch is not None or after is not None
    normal, total = empty_like(x), empty_like(x) if kept else x
    statistics = empty((rows, 2), torch.float32, x.device) if save else None
    size = max(1, (8192 if rows * channels > SMALL else 4096) // wide)
    tensors = (x, branch, gain, shift, after, total, normal, statistics)
    launch(
        "add_norm_forward", tensors, (-(-rows // size),), (rows, channels, eps), ROWS=size, CHANNELS=wide,
        BRANCH=branch is not None, KEEP=kept, AFTER=after is not None, SAVE=save, num_warps=4,
    )  # fmt: skip
    return normal, total, statistics


def layer_norm_past(x: Tensor, gain: Tensor, shift: Tensor, after: Tensor, eps: float) -> Tensor:
    """LayerNorm of x - after: [..., C]."""
    out, channels = empty_like(x), x.shape[-1]
    rows = x.numel() // channels
    tensors, numbers = (x, gain, shift, after, out), (rows, channels, eps)
    launch("layer_norm_forward", tensors, (-(-rows // 2),), numbers, ROWS=2, CHANNELS=tile(channels), num_warps=4)
    return out


def backward(
    dnormal: Tensor, past: Tensor | None, x: Tensor, gain: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm with respect to x (plus `past`, the gradient that bypasses the norm), gain and shift."""
    past = None if past is None else past.contiguous()
    channels, wide = x.shape[-1], tile(x.shape[-1])
    rows, size = x.numel() // channels, max(1, 2048 // wide)
    programs = min(PROGRAMS, -(-rows // size))
    dx, parts = empty_like(x), empty((programs, 2, channels), torch.float32, x.device)
    launch(
        "norm_backward", (dnormal.contiguous(), past, x, gain, statistics, dx, parts), (programs,), (rows, channels),
        ROWS=size, CHANNELS=wide, STAGES=3, PAST=past is not None, num_warps=4,
    )  # fmt: skip
    return dx, add_up(parts[:, 0], gain.dtype), add_up(parts[:, 1], gain.dtype)


def rms_forward(y: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of a contiguous y [..., K]."""
    out, (channels, wide) = empty_like(y), (y.shape[-1], tile(y.shape[-1]))
    rows, size = y.numel() // channels, max(1, (1 << 12) // wide)
    numbers = (rows, channels, eps)
    launch("rms_forward", (y, gain, out), (-(-rows // size),), numbers, ROWS=size, LATENT=wide, num_warps=4)
    return out


def rms_backward(
    dn: Tensor, y: Tensor, gain: Tensor | None, unit: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of y, and with a gain the sums over rows for gain and bias, [K] each; else the norm in `unit`.

    See `kernels.rms_backward`.
    """
    dn, y = dn.contiguous(), y.contiguous()
    channels, wide = y.shape[-1], tile(y.shape[-1])
    rows, size = y.numel() // channels, min(64, max(1, (1 << 13) // wide))
    programs, dy = -(-rows // size), empty_like(y)
    parts = None if gain is None else empty((programs, 2, channels), torch.float32, y.device)
    launch(
        "rms_backward", (dn, y, gain, dy, unit, parts), (programs,), (rows, channels, eps),
        ROWS=size, LATENT=wide, GAIN=gain is not None, num_warps=8,
    )  # fmt: skip
    if parts is None or gain is None:
        return dy, None, None
    return dy, add_up(parts[:, 0], gain.dtype), add_up(parts[:, 1], gain.dtype)


class AddNorm(torch.autograd.Function):
    """The autograd function of (LayerNorm(t), t) for t = x + branch. Its backward adds both gradients in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, gain: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """x, branch [..., C] of one dtype; gain, shift [C]."""
        normal, total, statistics = forward(x, branch, gain, shift, eps, save=True)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, gain, shift, statistics)
        return normal, total.view_as(total) if branch is None else total

    @staticmethod
    def backward(ctx: Any, dnormal: Tensor | None, past: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients; a second derivative goes through the plain norm."""
        total, gain, shift, statistics = ctx.saved_tensors
        of_branch = ctx.needs_input_grad[1]
        if dnormal is None:
            return past, past if of_branch else None, None, None, None
        if torch.is_grad_enabled():
            plain = layer_norm(total.float(), total.shape[-1:], gain.float(), shift.float(), ctx.eps).to(total.dtype)
            dx, dgain, dshift = torch.autograd.grad(plain, (total, gain, shift), dnormal, create_graph=True)
            dx = dx if past is None else dx + past
        else:
            dx, dgain, dshift = backward(dnormal, past, total, gain, statistics)
        return dx, dx if of_branch else None, dgain.to(gain.dtype), dshift.to(shift.dtype), None


class RmsNorm(torch.autograd.Function):
    """RMSNorm with all gradients in one pass; PyTorch's for the gain alone took twice as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x [..., C]; gain [C], rounded to the dtype of x."""
        ctx.eps = eps
        ctx.save_for_backward(x, gain)
        return rms_norm(x, gain.shape, gain.to(x.dtype), eps)

    @staticmethod
    def backward(ctx: Any, dnormal: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients; a second derivative goes through the plain norm."""
        x, gain = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = rms_norm(x.float(), gain.shape, gain.float(), ctx.eps).to(x.dtype)
            dx, dgain = torch.autograd.grad(plain, (x, gain), dnormal, create_graph=True)
        else:
            dx, found, _ = rms_backward(dnormal, x, gain, None, ctx.eps)
            assert found is not None
            dgain = found
        return dx, dgain.to(gain.dtype), None


def column_sums(
    d: Tensor, hidden: Tensor | None = None, approximate: str = "none", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sums over rows of d [M, C], computed in float32: [C] in `dtype`.

    With hidden [M, C], the input of a GELU: d, the gradient of the GELU's output, is first replaced in place by the
    gradient of `hidden`. approximate: "none" or "tanh", as in `torch.nn.functional.gelu`.
    """
    mode = None if hidden is None else approximate
    widths, most, warps, stages, total = TILES[mode]
    rows, channels = d.shape
    # the widest tile of which at most an eighth is idle
    fitting = (w for w in widths if (-channels % w) * 8 <= channels)
    wide = min(next(fitting, widths[-1]), tile(channels))
    # the same number of bytes for every dtype, because prefetched data has to fit
    size, across = most * 2 // (wide * d.element_size()), -(-channels // wide)
    down = max(1, min(-(-rows // size), total // across))
    parts = empty((down, channels), torch.float32, d.device)
    launch(
        "column_sums", (d, hidden, parts), (across, down), (rows, channels), ROWS=size, CHANNELS=wide, STAGES=stages,
        GELU=MODES[mode], num_warps=warps,
    )  # fmt: skip
    return add_up(parts, dtype)
