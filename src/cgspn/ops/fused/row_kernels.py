"""Triton kernels over whole rows of channels and over columns: LayerNorm with what is added before it, its gradient,
and the gradient of a GELU with the sums over rows that biases want.

Shape letters: M rows (tokens), C channels. A row is a head of HEAD channels and a tail of TAIL more, both powers of
two: one tile of the next power of two would leave almost half of the lanes idle at 1152 channels. Sums are float32;
rows are 64-bit offsets.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _total(x, branch, m, c, C, inside, BRANCH: tl.constexpr):
    """x + branch at rows m and channels c, rounded as it is stored: float32."""
    at = m[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=inside, other=0)
    if BRANCH:
        value = (value.to(tl.float32) + tl.load(branch + at, mask=inside, other=0).to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def _store_norm(value, inverse, gain, shift, after, total, normal, m, c, C, inside, mean, KEEP, AFTER):
    """Of one part of a row: total (+ after) where it is wanted, and the normalised row."""
    at, there = m[:, None] * C + c[None, :], c < C
    if KEEP:
        kept = value
        if AFTER:
            kept += tl.load(after + c, mask=there, other=0).to(tl.float32)[None, :]
        tl.store(total + at, kept.to(total.dtype.element_ty), mask=inside)
    y = (value - mean) * inverse * tl.load(gain + c, mask=there, other=0).to(tl.float32)[None, :]
    y += tl.load(shift + c, mask=there, other=0).to(tl.float32)[None, :]
    tl.store(normal + at, y.to(normal.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "eps"])
def add_norm_forward(
    x, branch, gain, shift, after, total, normal, rows, C, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BRANCH: tl.constexpr, KEEP: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """t = x + branch (BRANCH) of [M, C]; normal = LayerNorm(t); total = t + after (KEEP, AFTER)."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, HEAD)
    in_head = (m < rows)[:, None] & (c < C)[None, :]
    head = _total(x, branch, m, c, C, in_head, BRANCH)
    mean = tl.sum(head, 1)
    if TAIL:
        e = HEAD + tl.arange(0, TAIL)
        in_tail = (m < rows)[:, None] & (e < C)[None, :]
        tail = _total(x, branch, m, e, C, in_tail, BRANCH)
        mean += tl.sum(tail, 1)
    mean = (mean / C)[:, None]
    apart = tl.where(in_head, head - mean, 0.0)
    squares = tl.sum(apart * apart, 1)
    if TAIL:
        apart = tl.where(in_tail, tail - mean, 0.0)
        squares += tl.sum(apart * apart, 1)
    inverse = tl.rsqrt(squares / C + eps)[:, None]
    _store_norm(head, inverse, gain, shift, after, total, normal, m, c, C, in_head, mean, KEEP, AFTER)
    if TAIL:
        _store_norm(tail, inverse, gain, shift, after, total, normal, m, e, C, in_tail, mean, KEEP, AFTER)


@triton.jit
def _upstream(dnormal, gain, m, c, C, inside):
    """The gradient to the normalised row, before and after the gain."""
    d = tl.load(dnormal + m[:, None] * C + c[None, :], mask=inside, other=0).to(tl.float32)
    return d, d * tl.load(gain + c, mask=c < C, other=0).to(tl.float32)[None, :]


@triton.jit
def _store_gradient(dn, unit, inverse, plain, along, past, dx, m, c, C, inside, PAST):
    at = m[:, None] * C + c[None, :]
    value = inverse * (dn - plain - unit * along)
    if PAST:
        value += tl.load(past + at, mask=inside, other=0).to(tl.float32)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_backward(
    dnormal, past, x, gain, dx, parts, rows, C, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """The gradient of LayerNorm to x [M, C], plus (PAST) the one that reaches x past the norm; in parts
    [programs, 2, C] the sums over each program's rows for gain and shift. Mean and deviation are computed again.
    """
    c, e = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    gains, shifts = tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL:
        tail_gains, tail_shifts = tl.zeros([ROWS, TAIL], tl.float32), tl.zeros([ROWS, TAIL], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < rows:
        m = first + tl.arange(0, ROWS)
        in_head = (m < rows)[:, None] & (c < C)[None, :]
        head = _total(x, x, m, c, C, in_head, False)
        d, dn = _upstream(dnormal, gain, m, c, C, in_head)
        mean = tl.sum(head, 1)
        if TAIL:
            in_tail = (m < rows)[:, None] & (e < C)[None, :]
            tail = _total(x, x, m, e, C, in_tail, False)
            tail_d, tail_dn = _upstream(dnormal, gain, m, e, C, in_tail)
            mean += tl.sum(tail, 1)
        mean = (mean / C)[:, None]
        head = tl.where(in_head, head - mean, 0.0)
        squares, plain, along = tl.sum(head * head, 1), tl.sum(dn, 1), tl.sum(dn * head, 1)
        if TAIL:
            tail = tl.where(in_tail, tail - mean, 0.0)
            squares += tl.sum(tail * tail, 1)
            plain += tl.sum(tail_dn, 1)
            along += tl.sum(tail_dn * tail, 1)
        inverse = tl.rsqrt(squares / C + eps)[:, None]
        plain, along = (plain / C)[:, None], (along / C)[:, None] * inverse
        head *= inverse
        gains += d * head
        shifts += d
        _store_gradient(dn, head, inverse, plain, along, past, dx, m, c, C, in_head, PAST)
        if TAIL:
            tail *= inverse
            tail_gains += tail_d * tail
            tail_shifts += tail_d
            _store_gradient(tail_dn, tail, inverse, plain, along, past, dx, m, e, C, in_tail, PAST)
        first += tl.num_programs(0) * ROWS
    part = parts + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(part + c, tl.sum(gains, 0), mask=c < C)
    tl.store(part + C + c, tl.sum(shifts, 0), mask=c < C)
    if TAIL:
        tl.store(part + e, tl.sum(tail_gains, 0), mask=e < C)
        tl.store(part + C + e, tl.sum(tail_shifts, 0), mask=e < C)


@triton.jit(do_not_specialize=["rows"])
def column_sums(d, hidden, parts, rows, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr, GELU: tl.constexpr):
    """parts [programs, C]: sums over each program's rows of d [M, C].

    GELU 1 (exact) or 2 (tanh): d becomes, in place, the gradient to what the GELU was given, hidden [M, C], and that is
    summed as it is stored.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    while first < rows:
        m = first + tl.arange(0, ROWS)
        at, inside = m[:, None] * C + c[None, :], (m < rows)[:, None] & (c < C)[None, :]
        value = tl.load(d + at, mask=inside, other=0)
        if GELU:
            h = tl.load(hidden + at, mask=inside, other=0).to(tl.float32)
            h = tl.where(h > 32, 32.0, tl.where(h < -32, -32.0, h))  # where cubes of large ones would be infinite
            if GELU == 1:
                slope = 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
            else:
                # gelu = h s with s = sigmoid(2 k (h + 0.044715 h^3)), k = sqrt(2 / pi)
                s = tl.sigmoid(1.5957691216057308 * h * (1 + 0.044715 * h * h))
                slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
            value = (value.to(tl.float32) * slope).to(value.dtype)
            tl.store(d + at, value, mask=inside)
        total += value.to(tl.float32)
        first += tl.num_programs(1) * ROWS
    tl.store(parts + tl.program_id(1).to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)
