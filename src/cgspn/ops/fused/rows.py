"""LayerNorm with the sum before it, and the gradients of RMSNorm and GELU with the sums over rows that gains and biases
want: one pass over memory each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from ..backends import unsupported_reason
from ..functorch import transformed
from .library import _rms_backward, _tile

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


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels of this module run on such tensors: on a GPU, outside of traced programs.

    Those over whole rows take at most `CHANNELS_MOST` channels.
    """
    given = [t for t in tensors if t is not None]
    if torch.compiler.is_compiling() or transformed() or not all(t.is_cuda and t.numel() for t in given):
        return False
    if any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16) for t in given):
        return False
    return unsupported_reason("triton", given[0]) is None


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
    from . import row_kernels

    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    channels = x.shape[-1]
    rows, wide = x.numel() // channels, _tile(channels)
    normal = torch.empty_like(x)
    kept = branch is not None or after is not None
    total = torch.empty_like(x) if kept else x
    statistics = torch.empty(rows, 2, dtype=torch.float32, device=x.device) if save else None
    tile = max(1, (8192 if rows * channels > SMALL else 4096) // wide)
    row_kernels.add_norm_forward[((rows + tile - 1) // tile,)](
        x, branch, gain, shift, after, total, normal, statistics, rows, channels, eps, ROWS=tile, CHANNELS=wide,
        BRANCH=branch is not None, KEEP=kept, AFTER=after is not None, SAVE=save, num_warps=4,
    )  # fmt: skip
    return normal, total, statistics


def backward(
    dnormal: Tensor, past: Tensor | None, x: Tensor, gain: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm to x (plus `past`, the one that reaches it past the norm), gain and shift: float32."""
    from . import row_kernels

    dnormal = dnormal.contiguous()
    past = None if past is None else past.contiguous()
    channels = x.shape[-1]
    rows, wide = x.numel() // channels, _tile(channels)
    dx = torch.empty_like(x)
    tile = max(1, 2048 // wide)
    programs = min(PROGRAMS, (rows + tile - 1) // tile)
    parts = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    row_kernels.norm_backward[(programs,)](
        dnormal, past, x, gain, statistics, dx, parts, rows, channels, ROWS=tile, CHANNELS=wide, STAGES=3,
        PAST=past is not None, num_warps=4,
    )  # fmt: skip
    dgain, dshift = parts.sum(0)
    return dx, dgain, dshift


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
            dx, sums = _rms_backward(dnormal, x, gain, None, ctx.eps)
            assert sums is not None
            dgain = sums[0]
        return dx, dgain.to(gain.dtype), None


def column_sums(d: Tensor, hidden: Tensor | None = None, approximate: str = "none") -> Tensor:
    """The sums over rows of d [M, C], float32 [C].

    With hidden [M, C], what a GELU was given: d, the gradient to its output, first becomes in place that to `hidden`.
    approximate: "none" or "tanh", as of `torch.nn.functional.gelu`.
    """
    from . import row_kernels

    rows, channels = d.shape
    widths, size, warps, stages, total = TILES[None if hidden is None else approximate]
    # the widest of which an eighth at most would be idle
    fitting = (w for w in widths if (-channels % w) * 8 <= channels)
    wide = min(next(fitting, widths[-1]), _tile(channels))
    # as many bytes whatever the dtype: what is fetched ahead has to fit
    tile, across = size * 2 // (wide * d.element_size()), (channels + wide - 1) // wide
    down = max(1, min((rows + tile - 1) // tile, total // across))
    parts = torch.empty(down, channels, dtype=torch.float32, device=d.device)
    mode = 0 if hidden is None else 1 if approximate == "none" else 2
    row_kernels.column_sums[(across, down)](
        d, hidden, parts, rows, channels, ROWS=tile, CHANNELS=wide, STAGES=stages, GELU=mode, num_warps=warps
    )
    return parts.sum(0)
