"""Triton kernels of the pieces around the scan. Sums and norms are float32; products take the dtype of the tokens.

Shape letters: M rows (tokens), C channels of a token, K channels of the latent. A name in capitals and constexpr is a
tile, padded to a power of two. Rows are 64-bit offsets, so that more than 2^31 elements work.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_linear_forward(
    x, gain, shift, weight, bias, out, means, inverses, rows, C, K, eps,
    ROWS: tl.constexpr, LATENT: tl.constexpr, CHANNELS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """LayerNorm and linear in one pass over x [M, C]: the norm is applied to the product, not to its input.

    linear(norm(x)) = inverse * (x G - mean * sum(G)) + offset, with G = gain * weight and offset = weight shift + bias.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    inside = m < rows
    # squares are summed around the first channel: a mean far from zero would cancel them
    pilot = tl.load(x + m * C, mask=inside, other=0).to(tl.float32)
    product = tl.zeros([ROWS, LATENT], tl.float32)
    total, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    weights, offset = tl.zeros([LATENT], tl.float32), tl.zeros([LATENT], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        tile = tl.load(x + m[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0)
        w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0)
        w = w.to(tl.float32)
        g = tl.load(gain + c, mask=c < C, other=0).to(tl.float32)
        s = tl.load(shift + c, mask=c < C, other=0).to(tl.float32)
        apart = tl.where((c < C)[None, :], tile.to(tl.float32) - pilot[:, None], 0.0)
        total += tl.sum(apart, 1)
        squares += tl.sum(apart * apart, 1)
        scaled = (w * g[None, :]).to(tile.dtype)
        weights += tl.sum(scaled.to(tl.float32), 1)
        offset += tl.sum(w * s[None, :], 1)
        product = tl.dot(tile, tl.trans(scaled), product, input_precision="ieee")
    mean = total / C
    inverse = tl.rsqrt(squares / C - mean * mean + eps)
    mean += pilot
    offset += tl.load(bias + k, mask=k < K, other=0).to(tl.float32)
    y = inverse[:, None] * (product - mean[:, None] * weights[None, :]) + offset[None, :]
    tl.store(out + m[:, None] * K + k[None, :], y.to(out.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
    if SAVE:
        tl.store(means + m, mean, mask=inside)
        tl.store(inverses + m, inverse, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_linear_backward(
    dout, out, x, gain, weight, offset, weights, means, inverses, dx, rows, C, K,
    ROWS: tl.constexpr, LATENT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient to x. LayerNorm's two sums over channels are products of K numbers here, as everything that the
    output shows of x went through the linear layer: sum(dn) = dout . sum(G), sum(dn * norm) = dout . (out - offset).
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    inside = m < rows
    at, valid = m[:, None] * K + k[None, :], inside[:, None] & (k < K)[None, :]
    d = tl.load(dout + at, mask=valid, other=0)
    wide = d.to(tl.float32)
    mixed = tl.load(out + at, mask=valid, other=0).to(tl.float32)
    mixed -= tl.load(offset + k, mask=k < K, other=0)[None, :]
    plain = tl.sum(wide * tl.load(weights + k, mask=k < K, other=0)[None, :], 1) / C
    along = tl.sum(wide * mixed, 1) / C
    mean = tl.load(means + m, mask=inside, other=0)
    inverse = tl.load(inverses + m, mask=inside, other=0)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        here = inside[:, None] & (c < C)[None, :]
        tile = tl.load(x + m[:, None] * C + c[None, :], mask=here, other=0).to(tl.float32)
        w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0)
        g = tl.load(gain + c, mask=c < C, other=0).to(tl.float32)
        scaled = (w.to(tl.float32) * g[None, :]).to(d.dtype)
        dn = tl.dot(d, scaled, input_precision="ieee")
        normal = (tile - mean[:, None]) * inverse[:, None]
        value = inverse[:, None] * (dn - plain[:, None] - normal * along[:, None])
        tl.store(dx + m[:, None] * C + c[None, :], value.to(dx.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows", "eps", "normal_eps"])
def linear_residual_forward(
    residual, y, gain, weight, bias, scale, out, normal, normal_gain, normal_shift, after, rows, C, K, eps, normal_eps,
    ROWS: tl.constexpr, LATENT: tl.constexpr, CHANNELS: tl.constexpr,
    NORM: tl.constexpr, SCALE: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """t [M, C] = residual + scale * linear(RMSNorm(y)); y [M, K] stays on the chip for all channels of its rows.

    out = t; with NEXT, out = t + after, and normal = LayerNorm(t) of the same rows, while they are in the cache.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    inside = m < rows
    latent = tl.load(y + m[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
    if NORM:
        wide = latent.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 1) / K + eps)
        g = tl.load(gain + k, mask=k < K, other=0).to(tl.float32)
        latent = (wide * inverse[:, None] * g[None, :]).to(latent.dtype)
    pilot = tl.load(residual + m * C, mask=inside, other=0).to(tl.float32)  # as in norm_linear_forward
    total, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        w = tl.load(weight + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & (k < K)[None, :], other=0)
        branch = tl.dot(latent, tl.trans(w.to(latent.dtype)), input_precision="ieee")
        branch += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)[None, :]
        if SCALE:
            branch *= tl.load(scale + c, mask=c < C, other=0).to(tl.float32)[None, :]
        at, here = m[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
        branch += tl.load(residual + at, mask=here, other=0).to(tl.float32)
        value = branch.to(out.dtype.element_ty)
        tl.store(out + at, value, mask=here)
        if NEXT:
            apart = tl.where((c < C)[None, :], value.to(tl.float32) - pilot[:, None], 0.0)
            total += tl.sum(apart, 1)
            squares += tl.sum(apart * apart, 1)
    if NEXT:
        tl.debug_barrier()  # what one thread wrote above, another may read below
        mean = total / C
        inverse = tl.rsqrt(squares / C - mean * mean + normal_eps)
        mean += pilot
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            at, here = m[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
            mixed = tl.load(out + at, mask=here, other=0).to(tl.float32)
            factor = tl.load(normal_gain + c, mask=c < C, other=0).to(tl.float32)
            offset = tl.load(normal_shift + c, mask=c < C, other=0).to(tl.float32)
            ready = (mixed - mean[:, None]) * inverse[:, None] * factor[None, :] + offset[None, :]
            tl.store(normal + at, ready.to(normal.dtype.element_ty), mask=here)
            mixed += tl.load(after + c, mask=c < C, other=0).to(tl.float32)[None, :]
            tl.store(out + at, mixed.to(out.dtype.element_ty), mask=here)


@triton.jit
def _near(x, mask, image, row, column, dy, dx, c, H, W, C, MASKED: tl.constexpr):
    """x at (row + dy, column + dx), [columns, channels] in float32; zero outside the image."""
    r, w = row + dy, column + dx
    # a stretch of a column that is not there has no positions; `and` of a scalar and a tile is wide in the interpreter
    w = tl.where((r >= 0) & (r < H), w, -1)
    there = (w >= 0) & (w < W)
    place = (image * H + r) * W + w
    if MASKED:
        there = there & (tl.load(mask + place, mask=there, other=0) != 0)
    return tl.load(x + place[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "W", "eps"])
def local_norm_forward(
    x, kernel, bias, gain, mask, out, H, W, C, eps,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """A stretch of one row, all channels: x + depthwise convolution (its transpose if FLIP), then RMSNorm if NORM."""
    row = tl.program_id(0).to(tl.int64)
    image, row = row // H, row % H
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, CHANNELS)
    half: tl.constexpr = SIDE // 2
    total = _near(x, mask, image, row, column, 0, 0, c, H, W, C, MASKED)
    if BIAS:
        total += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)[None, :]
    for dy in tl.static_range(SIDE):
        for dx in tl.static_range(SIDE):
            tap = (SIDE - 1 - dy) * SIDE + SIDE - 1 - dx if FLIP else dy * SIDE + dx
            weight = tl.load(kernel + c * SIDE * SIDE + tap, mask=c < C, other=0).to(tl.float32)
            total += _near(x, mask, image, row, column, dy - half, dx - half, c, H, W, C, MASKED) * weight[None, :]
    if NORM:
        inverse = tl.rsqrt(tl.sum(total * total, 1) / C + eps)
        g = tl.load(gain + c, mask=c < C, other=0).to(tl.float32)
        total = total * inverse[:, None] * g[None, :]
    place = ((image * H + row) * W + column)[:, None] * C + c[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(column < W)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["images", "H", "W"])
def local_kernel_gradient(
    x, dy_, mask, parts, images, H, W, C,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's weights from every P-th row: parts [P, C, SIDE * SIDE], to be added up."""
    c = tl.arange(0, CHANNELS)
    half: tl.constexpr = SIDE // 2
    for dy in tl.static_range(SIDE):
        for dx in tl.static_range(SIDE):
            total = tl.zeros([CHANNELS], tl.float32)
            line = tl.program_id(0).to(tl.int64)
            while line < images * H:
                image, row = line // H, line % H
                first = 0
                while first < W:
                    column = first + tl.arange(0, COLUMNS)
                    place = (image * H + row) * W + column
                    valid = (column < W)[:, None] & (c < C)[None, :]
                    d = tl.load(dy_ + place[:, None] * C + c[None, :], mask=valid, other=0).to(tl.float32)
                    near = _near(x, mask, image, row, column, dy - half, dx - half, c, H, W, C, MASKED)
                    total += tl.sum(d * near, 0)
                    first += COLUMNS
                line += tl.num_programs(0)
            at = parts + (tl.program_id(0) * C + c) * SIDE * SIDE + dy * SIDE + dx
            tl.store(at, total, mask=c < C)
