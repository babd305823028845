"""The loss of a tap in two Triton kernels: each pass reads both sides once, whatever the loss adds up.

Shape letters: M rows (tokens), N rows of an image, C channels. A name in capitals and constexpr is a tile, padded to a
power of two. Everything is float32 inside; rows are 64-bit offsets.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # elements of a program
NUMBERS = ["rows", "kl_weight", "energy", "upstream"]  # no kernel of their own for a value or an alignment


@triton.jit
def _scaled(x, energy, m, c, N, image, row, inside):
    """Rows m of x [images, N, C], over the root of the energy; zero outside."""
    at = (m // N) * image + (m % N) * row
    scale = tl.maximum(tl.sqrt(tl.load(energy)), 1e-6)
    return tl.load(x + at[:, None] + c[None, :], mask=inside, other=0).to(tl.float32) / scale


@triton.jit
def _log_softmax(x, inside):
    x = x - tl.max(tl.where(inside, x, -float("inf")), 1)[:, None]
    return x - tl.log(tl.sum(tl.where(inside, tl.exp(x), 0.0), 1))[:, None]


@triton.jit(do_not_specialize=NUMBERS)
def tap_loss_forward(
    student, teacher, energy, sums, rows, N, C, s_image, s_row, t_image, t_row, kl_weight,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """sums [programs]: what the rows of each program add to the mean over rows."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    s = _scaled(student, energy, m, c, N, s_image, s_row, inside)
    t = _scaled(teacher, energy, m, c, N, t_image, t_row, inside)
    value = (s - t) * (s - t) / C
    if KL:
        channel = (c < C)[None, :]  # rows that are not there are zeros: finite
        log_s = _log_softmax(s, channel)
        value += kl_weight * tl.exp(log_s) * (log_s - _log_softmax(t, channel))
    total = tl.sum(tl.sum(tl.where(inside, value, 0.0), 1), 0)
    tl.store(sums + tl.program_id(0), total / rows)


@triton.jit(do_not_specialize=NUMBERS)
def tap_loss_backward(
    student, teacher, energy, upstream, out, rows, N, C, s_image, s_row, t_image, t_row, kl_weight,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """out [M, C]: the gradient to the student, from the same two inputs.

    With p the student's softmax, d the difference of the log-softmaxes and KL = sum(p d): dKL/ds = p (d - KL).
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    s = _scaled(student, energy, m, c, N, s_image, s_row, inside)
    t = _scaled(teacher, energy, m, c, N, t_image, t_row, inside)
    value = 2 * (s - t) / C
    if KL:
        channel = (c < C)[None, :]
        log_s = _log_softmax(s, channel)
        p, apart = tl.exp(log_s), log_s - _log_softmax(t, channel)
        divergence = tl.sum(tl.where(channel, p * apart, 0.0), 1)
        value += kl_weight * p * (apart - divergence[:, None])
    value *= tl.load(upstream) / (rows * tl.maximum(tl.sqrt(tl.load(energy)), 1e-6))
    tl.store(out + m[:, None] * C + c[None, :], value.to(out.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x as [images, N, C] with channels beside one another, and the strides of image and row."""
    x = x.unsqueeze(0) if x.ndim == 2 else x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def _tile(channels: int) -> int:
    """Rows of a program."""
    return max(1, TILE // triton.next_power_of_2(channels))


def _launch(kernel, student: Tensor, teacher: Tensor, energy: Tensor, weight: float, *outputs: Tensor) -> None:
    channels = student.shape[-1]
    rows = student.numel() // channels
    tile = _tile(channels)
    (s, s_image, s_row), (t, t_image, t_row) = _rows(student), _rows(teacher)
    kernel[(triton.cdiv(rows, tile),)](
        s, t, energy, *outputs, rows, s.shape[1], channels, s_image, s_row, t_image, t_row, weight,
        ROWS=tile, CHANNELS=triton.next_power_of_2(channels), KL=bool(weight), num_warps=8,
    )  # fmt: skip


class _TapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, energy: Tensor, kl_weight: float) -> Tensor:
        """The loss, a float32 scalar."""
        ctx.save_for_backward(student, teacher, energy)
        ctx.kl_weight = kl_weight
        channels = student.shape[-1]
        programs = triton.cdiv(student.numel() // channels, _tile(channels))
        sums = student.new_empty(programs, dtype=torch.float32)
        _launch(tap_loss_forward, student, teacher, energy, kl_weight, sums)
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient to the student, rounded once to its dtype."""
        student, teacher, energy = ctx.saved_tensors
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        _launch(tap_loss_backward, student, teacher, energy, ctx.kl_weight, upstream, out)
        return out, None, None, None


def fused_tap_loss(student: Tensor, teacher: Tensor, energy: Tensor, kl_weight: float) -> Tensor:
    """`losses.tap_loss` of tensors of one shape, its gradient to the student alone. energy: float32, a scalar."""
    loss: Tensor = _TapLoss.apply(student, teacher, energy, kl_weight)
    return loss
