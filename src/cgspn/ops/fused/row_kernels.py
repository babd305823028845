"""Triton kernels over rows and columns of [M, C]: residual addition with LayerNorm, its gradient, GELU, and GELU's
gradient with the sums over rows for bias gradients.

Shape letters: M rows (tokens), C channels. Constexpr names in capitals are tile sizes, padded to a power of two.
Sums are float32; row offsets are 64 bits wide.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "eps"])
def add_norm_forward(
    x, branch, gain, shift, after, total, normal, statistics, rows, C, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    BRANCH: tl.constexpr, KEEP: tl.constexpr, AFTER: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """t = x + branch [M, C], rounded as stored; normal = LayerNorm(t); total = t + after; statistics [M, 2]: mean and
    inverse deviation. BRANCH, KEEP, AFTER and SAVE say which of branch, total, after and statistics exist.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    at = m[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=inside, other=0)
    if BRANCH:
        value = (value.to(tl.float32) + tl.load(branch + at, mask=inside, other=0).to(tl.float32)).to(value.dtype)
    value = value.to(tl.float32)
    if KEEP:
        kept = value
        if AFTER:
            kept += tl.load(after + c, mask=c < C, other=0).to(tl.float32)[None, :]
        tl.store(total + at, kept.to(total.dtype.element_ty), mask=inside)
    mean = tl.sum(value, 1) / C
    value = tl.where(inside, value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    y = value * inverse[:, None] * tl.load(gain + c, mask=c < C, other=0).to(tl.float32)[None, :]
    y += tl.load(shift + c, mask=c < C, other=0).to(tl.float32)[None, :]
    tl.store(normal + at, y.to(normal.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(statistics + 2 * m, mean, mask=m < rows)
        tl.store(statistics + 2 * m + 1, inverse, mask=m < rows)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    dnormal, past, x, gain, statistics, dx, parts, rows, C,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """The gradient of LayerNorm with respect to x [M, C], plus (PAST) the gradient of x that bypasses the norm. parts
    [programs, 2, C] get the sums over each program's rows for gain and shift.
    """
    c = tl.arange(0, CHANNELS)
    factor = tl.load(gain + c, mask=c < C, other=0).to(tl.float32)[None, :]
    gains, shifts = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    # with num_stages of its own, a loop prefetches
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        m = first + tl.arange(0, ROWS).to(tl.int64)
        at, inside = m[:, None] * C + c[None, :], (m < rows)[:, None] & (c < C)[None, :]
        d = tl.load(dnormal + at, mask=inside, other=0).to(tl.float32)
        unit = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        mean = tl.load(statistics + 2 * m, mask=m < rows, other=0)[:, None]
        inverse = tl.load(statistics + 2 * m + 1, mask=m < rows, other=0)[:, None]
        unit = tl.where(inside, (unit - mean) * inverse, 0.0)
        dn = d * factor
        plain, along = tl.reduce((dn, dn * unit), 1, _both)
        gains += d * unit
        shifts += d
        value = inverse * (dn - (plain / C)[:, None] - unit * (along / C)[:, None])
        if PAST:
            value += tl.load(past + at, mask=inside, other=0).to(tl.float32)
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
    part = parts + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(part + c, tl.sum(gains, 0), mask=c < C)
    tl.store(part + C + c, tl.sum(shifts, 0), mask=c < C)


@triton.jit(do_not_specialize=["rows"])
def column_sums(
    d, hidden, parts, rows, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, GELU: tl.constexpr
):
    """parts [programs, C]: sums over each program's rows of d [M, C].

    If GELU is 1 (exact) or 2 (tanh), d is the gradient of a GELU's output. It is first replaced in place by the
    gradient of the GELU's input, `hidden` [M, C], which is then summed as stored.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    # with num_stages of its own, a loop prefetches
    for first in tl.range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        m = first + tl.arange(0, ROWS).to(tl.int64)
        at, inside = m[:, None] * C + c[None, :], (m < rows)[:, None] & (c < C)[None, :]
        value = tl.load(d + at, mask=inside, other=0)
        if GELU:
            h = tl.load(hidden + at, mask=inside, other=0).to(tl.float32)
            h = tl.where(h > 32, 32.0, tl.where(h < -32, -32.0, h))  # cubes of larger values would overflow
            if GELU == 1:
                slope = 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
            else:
                # gelu = h s with s = sigmoid(2 k (h + 0.044715 h^3)), k = sqrt(2 / pi)
                s = tl.sigmoid(1.5957691216057308 * h * (1 + 0.044715 * h * h))
                slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
            value = (value.to(tl.float32) * slope).to(value.dtype)
            tl.store(d + at, value, mask=inside)
        total += value.to(tl.float32)
    tl.store(parts + tl.program_id(1).to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def gelu(x, out, count, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """The GELU of `count` values: exact if GELU is 1, the tanh approximation if it is 2."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x + at, mask=at < count, other=0).to(tl.float32)
    bounded = tl.where(h > 32, 32.0, tl.where(h < -32, -32.0, h))  # as in column_sums
    if GELU == 1:
        share = 0.5 * (1 + tl.erf(bounded * 0.7071067811865476))
    else:
        share = tl.sigmoid(1.5957691216057308 * bounded * (1 + 0.044715 * bounded * bounded))
    tl.store(out + at, (h * share).to(out.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["count"])
def add_up(parts, out, count, stride, C, CHANNELS: tl.constexpr, STEP: tl.constexpr):
    """out [C]: the sum of `count` float32 rows of parts, `stride` elements apart."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([STEP, CHANNELS], tl.float32)
    for first in range(0, count, STEP):
        m = first + tl.arange(0, STEP)
        inside = (m < count)[:, None] & (c < C)[None, :]
        total += tl.load(parts + m.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < C)
