"""LayerNorm with the sum before it, and the gradients of RMSNorm and GELU with the sums over rows that gains and biases
want: one pass over memory each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from ..backends import unsupported_reason
from ..eager import is_eager
from ..gpu import Gpu, gpu_of, on_accelerator
from ..replay import empty, empty_like
from ..triton_launch import TritonLaunch
from .tiles import tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_MOST = 4096  # of a row that stays on the chip
SMALL = 1 << 23  # elements below which rows are few, and tiles smaller
PROGRAMS = 528  # that share the sums over rows: four for each multiprocessor of the largest GPUs
# Of sums alone and through the gradient of each GELU: widths of a tile, its elements in 16 bits, warps, loops fetched
# ahead, and programs. The fastest on an H100 for 47 thousand rows of 1152 and 4304 channels.
TILES: dict[str | None, tuple[tuple[int, ...], int, int, int, int]] = {
    None: ((128,), 2048, 2, 3, 2 * PROGRAMS),
    "none": ((128,), 1024, 2, 3, 2 * PROGRAMS),
    "tanh": ((512, 256, 128), 8192, 8, 3, 4 * PROGRAMS),
}


def can_use_rows(*tensors: Tensor | None) -> bool:
    """Whether the kernels of this module run on such tensors: outside of traced programs, where Triton runs.

    Those over whole rows take at most `CHANNELS_MOST` channels.
    """
    given = [t for t in tensors if t is not None]
    first = given[0]
    if not on_accelerator(first) or not is_eager(*given) or any(t.dtype not in DTYPES or not t.numel() for t in given):
        return False
    return unsupported_reason("triton", first) is None


@functools.lru_cache(maxsize=512)
def _add_up_launch(gpu: Gpu | None, dtype: torch.dtype, count: int, stride: int, channels: int) -> TritonLaunch:
    from . import row_kernels

    numbers, grid = (count, stride, channels), (-(-channels // 64),)
    return TritonLaunch(row_kernels.add_up, gpu, grid, numbers, CHANNELS=64, STEP=32, num_warps=4)


def add_up(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of float32 parts [P, ...] over the first dimension, in its order; the others contiguous."""
    count, channels = parts.shape[0], parts.shape[1:].numel()
    out = empty(parts.shape[1:], dtype, parts.device)
    _add_up_launch(gpu_of(parts.device), dtype, count, parts.stride(0), channels)(parts, out)
    return out


@functools.lru_cache(maxsize=512)
def _gelu_launch(gpu: Gpu | None, dtype: torch.dtype, count: int, approximate: str) -> TritonLaunch:
    from . import row_kernels

    constants = {"BLOCK": 4096, "GELU": 2 if approximate == "tanh" else 1}
    return TritonLaunch(row_kernels.gelu, gpu, (-(-count // 4096),), (count,), **constants, num_warps=8)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """As `torch.nn.functional.gelu`, of a contiguous x."""
    out = empty_like(x)
    _gelu_launch(gpu_of(x.device), x.dtype, x.numel(), approximate)(x, out)
    return out


@functools.lru_cache(maxsize=512)
def _add_norm_launch(
    gpu: Gpu | None, dtypes: tuple[torch.dtype | None, ...], rows: int, channels: int, eps: float, save: bool
) -> TritonLaunch:
    from . import row_kernels

    _, branch, _, _, after = dtypes
    wide = tile(channels)
    size = max(1, (8192 if rows * channels > SMALL else 4096) // wide)
    kept = branch is not None or after is not None
    return TritonLaunch(
        row_kernels.add_norm_forward, gpu, (-(-rows // size),), (rows, channels, eps), ROWS=size, CHANNELS=wide,
        BRANCH=branch is not None, KEEP=kept, AFTER=after is not None, SAVE=save, num_warps=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def layer_norm_launch(
    gpu: Gpu | None, dtypes: tuple[torch.dtype, ...], rows: int, channels: int, eps: float
) -> TritonLaunch:
    """LayerNorm of x - after: of x, gain, shift, after and the output."""
    from . import kernels

    return TritonLaunch(
        kernels.layer_norm_forward, gpu, (-(-rows // 2),), (rows, channels, eps),
        ROWS=2, CHANNELS=tile(channels), num_warps=4,
    )  # fmt: skip


def forward(
    x: Tensor,
    branch: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    after: Tensor | None = None,
    *,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """LayerNorm(t) of t = x + branch, and t + after, in the dtype of x: [..., C] each; x itself if nothing is added.

    With `save` also mean and inverse deviation of each row, float32 [M, 2].
    """
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    normal = empty_like(x)
    total = x if branch is None and after is None else empty_like(x)
    statistics = empty((rows, 2), torch.float32, x.device) if save else None
    tensors = (x, branch, gain, shift, after)
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    _add_norm_launch(gpu_of(x.device), dtypes, rows, channels, eps, save)(*tensors, total, normal, statistics)
    return normal, total, statistics


@functools.lru_cache(maxsize=512)
def _norm_backward_launch(
    gpu: Gpu | None, dtypes: tuple[torch.dtype | None, ...], rows: int, channels: int
) -> tuple[TritonLaunch, int]:
    from . import row_kernels

    wide = tile(channels)
    size = max(1, 2048 // wide)
    programs = min(PROGRAMS, -(-rows // size))
    launch = TritonLaunch(
        row_kernels.norm_backward, gpu, (programs,), (rows, channels), ROWS=size, CHANNELS=wide, STAGES=3,
        PAST=dtypes[1] is not None, num_warps=4,
    )  # fmt: skip
    return launch, programs


def backward(
    dnormal: Tensor, past: Tensor | None, x: Tensor, gain: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm to x (plus `past`, the one that reaches it past the norm), gain and shift."""
    tensors = (dnormal.contiguous(), None if past is None else past.contiguous(), x, gain)
    channels = x.shape[-1]
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    launch, programs = _norm_backward_launch(gpu_of(x.device), dtypes, x.numel() // channels, channels)
    dx = empty_like(x)
    parts = empty((programs, 2, channels), torch.float32, x.device)
    launch(*tensors, statistics, dx, parts)
    return dx, add_up(parts[:, 0], gain.dtype), add_up(parts[:, 1], gain.dtype)


@functools.lru_cache(maxsize=512)
def _rms_backward_launch(
    gpu: Gpu | None, dtypes: tuple[torch.dtype | None, ...], rows: int, channels: int, eps: float
) -> tuple[TritonLaunch, int]:
    from . import kernels

    wide = tile(channels)
    size = min(64, max(1, (1 << 13) // wide))
    programs = -(-rows // size)
    launch = TritonLaunch(
        kernels.rms_backward, gpu, (programs,), (rows, channels, eps),
        ROWS=size, LATENT=wide, GAIN=dtypes[2] is not None, num_warps=8,
    )  # fmt: skip
    return launch, programs


def rms_backward(
    dn: Tensor, y: Tensor, gain: Tensor | None, unit: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient to y; with a gain the sums over rows for gain and bias, [K] each, without the norm in `unit`.

    See `kernels.rms_backward`.
    """
    tensors = (dn.contiguous(), y.contiguous(), gain)
    channels = y.shape[-1]
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    launch, programs = _rms_backward_launch(gpu_of(y.device), dtypes, y.numel() // channels, channels, eps)
    dy = empty_like(tensors[1])
    parts = None if gain is None else empty((programs, 2, channels), torch.float32, y.device)
    launch(*tensors, dy, unit, parts)
    if parts is None or gain is None:
        return dy, None, None
    return dy, add_up(parts[:, 0], gain.dtype), add_up(parts[:, 1], gain.dtype)


class AddNorm(torch.autograd.Function):
    """(LayerNorm(t), t) of t = x + branch; the gradients of both meet in one pass."""

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
        """Differentiable again, by way of the plain norm."""
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
    """RMSNorm, whose gradients take one pass; PyTorch's to the gain alone took twice as long (results/training)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x [..., C]; gain [C], which is rounded to the dtype of x."""
        ctx.eps = eps
        ctx.save_for_backward(x, gain)
        return rms_norm(x, gain.shape, gain.to(x.dtype), eps)

    @staticmethod
    def backward(ctx: Any, dnormal: Tensor) -> tuple[Tensor, Tensor, None]:
        """Differentiable again, by way of the plain norm."""
        x, gain = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = rms_norm(x.float(), gain.shape, gain.float(), ctx.eps).to(x.dtype)
            dx, dgain = torch.autograd.grad(plain, (x, gain), dnormal, create_graph=True)
        else:
            dx, found, _ = rms_backward(dnormal, x, gain, None, ctx.eps)
            assert found is not None
            dgain = found
        return dx, dgain.to(gain.dtype), None


@functools.lru_cache(maxsize=512)
def _column_launch(
    gpu: Gpu | None, dtypes: tuple[torch.dtype | None, ...], rows: int, channels: int, mode: str | None
) -> tuple[TritonLaunch, int]:
    from . import row_kernels

    widths, most, warps, stages, total = TILES[mode]
    # the widest of which an eighth at most would be idle
    fitting = (w for w in widths if (-channels % w) * 8 <= channels)
    wide = min(next(fitting, widths[-1]), tile(channels))
    # as many bytes whatever the dtype: what is fetched ahead has to fit
    assert dtypes[0] is not None
    size, across = most * 2 // (wide * dtypes[0].itemsize), -(-channels // wide)
    down = max(1, min(-(-rows // size), total // across))
    launch = TritonLaunch(
        row_kernels.column_sums, gpu, (across, down), (rows, channels), ROWS=size, CHANNELS=wide, STAGES=stages,
        GELU={None: 0, "none": 1, "tanh": 2}[mode], num_warps=warps,
    )  # fmt: skip
    return launch, down


def column_sums(
    d: Tensor, hidden: Tensor | None = None, approximate: str = "none", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sums over rows of d [M, C], added up in float32: [C] in `dtype`.

    With hidden [M, C], what a GELU was given: d, the gradient to its output, first becomes in place that to `hidden`.
    approximate: "none" or "tanh", as of `torch.nn.functional.gelu`.
    """
    dtypes = (d.dtype, None if hidden is None else hidden.dtype)
    launch, down = _column_launch(gpu_of(d.device), dtypes, *d.shape, None if hidden is None else approximate)
    parts = empty((down, d.shape[1]), torch.float32, d.device)
    launch(d, hidden, parts)
    return add_up(parts, dtype)
