"""The tap loss in two Triton kernels, forward and backward. Each reads both inputs once.

Shape letters: M rows (tokens), N rows of an image, C channels. Constexpr names in capitals are tile sizes. A row is
split into a head and a tail whose widths are powers of two (`split_row`). Arithmetic is float32; offsets are 64-bit.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1024  # elements of a row's head per warp, so that reductions need no shared memory
NUMBERS = ["rows", "kl_weight", "energy", "upstream"]  # not specialised for values or alignment


@triton.jit
def _scaled(x, energy, m, c, N, image, row, inside):
    """Rows m of x [images, N, C], divided by the root of the energy; zero outside."""
    at = (m // N) * image + (m % N) * row
    scale = tl.maximum(tl.sqrt(tl.load(energy)), 1e-6)
    return tl.load(x + at[:, None] + c[None, :], mask=inside, other=0).to(tl.float32) / scale


@triton.jit
def _pair(student, teacher, energy, m, c, N, C, s_image, s_row, t_image, t_row, rows):
    """Channels c of rows m of student and teacher."""
    inside = (m < rows)[:, None] & (c < C)[None, :]
    s = _scaled(student, energy, m, c, N, s_image, s_row, inside)
    return s, _scaled(teacher, energy, m, c, N, t_image, t_row, inside)


@triton.jit
def _largest(x, there):
    return tl.max(tl.where(there, x, -float("inf")), 1)


@triton.jit
def _softmax(head, tail, c, e, C):
    """For each row, the log of the softmax's denominator, and the softmax of head and tail."""
    in_head, in_tail = (c < C)[None, :], (e < C)[None, :]  # missing rows are zeros, which stay finite
    largest = tl.maximum(_largest(head, in_head), _largest(tail, in_tail))
    powers = tl.where(in_head, tl.exp(head - largest[:, None]), 0.0)
    tail_powers = tl.where(in_tail, tl.exp(tail - largest[:, None]), 0.0)
    total = tl.sum(powers, 1) + tl.sum(tail_powers, 1)
    return largest + tl.log(total), powers / total[:, None], tail_powers / total[:, None]


@triton.jit(do_not_specialize=NUMBERS)
def tap_loss_forward(
    student, teacher, energy, sums, rows, N, C, s_image, s_row, t_image, t_row, kl_weight,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """sums [programs]: the contribution of each program's rows to the mean over rows."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c, e = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)  # without a tail, one channel outside
    s, t = _pair(student, teacher, energy, m, c, N, C, s_image, s_row, t_image, t_row, rows)
    more_s, more_t = _pair(student, teacher, energy, m, e, N, C, s_image, s_row, t_image, t_row, rows)
    apart, more = s - t, more_s - more_t
    value = (tl.sum(apart * apart, 1) + tl.sum(more * more, 1)) / C
    if KL:
        log_s, p, more_p = _softmax(s, more_s, c, e, C)
        log_t, _, _ = _softmax(t, more_t, c, e, C)
        value += kl_weight * (tl.sum(p * apart, 1) + tl.sum(more_p * more, 1) + log_t - log_s)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(m < rows, value, 0.0), 0) / rows)


@triton.jit(do_not_specialize=NUMBERS)
def tap_loss_backward(
    student, teacher, energy, upstream, out, rows, N, C, s_image, s_row, t_image, t_row, kl_weight,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """out [M, C]: the gradient of the student's features, from the same two inputs.

    With p the student's softmax, d the difference of the log-softmaxes and KL = sum(p d): dKL/ds = p (d - KL). The
    constants of the log-softmaxes cancel in d - KL.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c, e = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    s, t = _pair(student, teacher, energy, m, c, N, C, s_image, s_row, t_image, t_row, rows)
    more_s, more_t = _pair(student, teacher, energy, m, e, N, C, s_image, s_row, t_image, t_row, rows)
    factor = tl.load(upstream) / (rows * tl.maximum(tl.sqrt(tl.load(energy)), 1e-6))
    apart, more = s - t, more_s - more_t
    value, more_value = 2 * apart / C, 2 * more / C
    if KL:
        _, p, more_p = _softmax(s, more_s, c, e, C)
        mean = tl.sum(p * apart, 1) + tl.sum(more_p * more, 1)
        value += kl_weight * p * (apart - mean[:, None])
        more_value += kl_weight * more_p * (more - mean[:, None])
    row, valid = out + m[:, None] * C, (m < rows)[:, None]
    tl.store(row + c[None, :], (factor * value).to(out.dtype.element_ty), mask=valid & (c < C)[None, :])
    tl.store(row + e[None, :], (factor * more_value).to(out.dtype.element_ty), mask=valid & (e < C)[None, :])


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x as [images, N, C] with contiguous channels, and the strides of image and row."""
    x = x.unsqueeze(0) if x.ndim == 2 else x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def split_row(channels: int) -> tuple[int, int]:
    """Split a row of channels into a head and a tail whose widths are powers of two; the tail may be 0.

    One tile of the next power of two would leave almost half of the lanes idle at 1152 channels.
    """
    whole = triton.next_power_of_2(channels)
    if whole == channels or channels < 64:
        return whole, 0
    head = whole // 2
    tail = max(16, triton.next_power_of_2(channels - head))
    return (head, tail) if head + tail < whole else (whole, 0)


def _launch(kernel, student: Tensor, teacher: Tensor, energy: Tensor, weight: float, *outputs: Tensor) -> None:
    """Launch a kernel with `_tile` rows for each program; one warp unless rows are long."""
    channels, rows = student.shape[-1], student.numel() // student.shape[-1]
    (head, tail), tile = split_row(channels), _tile(channels)
    (s, s_image, s_row), (t, t_image, t_row) = _rows(student), _rows(teacher)
    kernel[(triton.cdiv(rows, tile),)](
        s, t, energy, *outputs, rows, s.shape[1], channels, s_image, s_row, t_image, t_row, weight,
        ROWS=tile, HEAD=head, TAIL=tail, KL=bool(weight), num_warps=max(1, head // TILE),
    )  # fmt: skip


def _tile(channels: int) -> int:
    return max(1, TILE // split_row(channels)[0])


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
        """The gradient of the student's features, rounded once to their dtype."""
        student, teacher, energy = ctx.saved_tensors
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        _launch(tap_loss_backward, student, teacher, energy, ctx.kl_weight, upstream, out)
        return out, None, None, None


def fused_tap_loss(student: Tensor, teacher: Tensor, energy: Tensor, kl_weight: float) -> Tensor:
    """`losses.tap_loss`, differentiable in the student. Inputs have one shape. energy: the target scale, float32 []."""
    loss: Tensor = _TapLoss.apply(student, teacher, energy, kl_weight)
    return loss
