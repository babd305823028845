"""Triton kernels for the layers around the scan. Sums and norms are float32; matrix products use the dtype of the
tokens.

Shape letters: M rows (tokens), C channels of a token, K channels of the latent. Constexpr names in capitals are tile
sizes, padded to a power of two. Row offsets are 64 bits wide, so that tensors may exceed 2^31 elements.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_linear_fold(gain, shift, weight, bias, folded, sums, C, K, CHANNELS: tl.constexpr):
    """Fold LayerNorm's gain and shift into one row of the linear layer: folded [K, C]; sums and offsets [2, K]."""
    k = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    w = tl.load(weight + k * C + c, mask=c < C, other=0).to(tl.float32)
    scaled = (w * tl.load(gain + c, mask=c < C, other=0).to(tl.float32)).to(folded.dtype.element_ty)
    tl.store(folded + k * C + c, scaled, mask=c < C)
    tl.store(sums + k, tl.sum(scaled.to(tl.float32), 0))
    shifted = tl.sum(w * tl.load(shift + c, mask=c < C, other=0).to(tl.float32), 0)
    tl.store(sums + K + k, shifted + tl.load(bias + k).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_linear_forward(
    x, folded, sums, out, statistics, rows, C, K, eps,
    ROWS: tl.constexpr, LATENT: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """LayerNorm and a linear layer in one pass over x [M, C]. The norm is applied to the product, not to its input.

    linear(norm(x)) = inverse * (x G - mean * sum(G)) + offset, with G = folded = gain * weight and offset = weight
    shift + bias. EVEN: C is a multiple of CHANNELS. SAVE: write mean and inverse deviation of rows to statistics [2,
    M].
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    inside = m < rows
    # squares are taken relative to the first channel, to avoid cancellation if the mean is far from zero
    pilot = tl.load(x + m * C, mask=inside, other=0).to(tl.float32)
    product = tl.zeros([ROWS, LATENT], tl.float32)
    # eight partial sums per row until the end, so that threads need not synchronise for every tile
    total, squares = tl.zeros([ROWS, 8], tl.float32), tl.zeros([ROWS, 8], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        here = inside[:, None] if EVEN else inside[:, None] & (c < C)[None, :]
        there = (k < K)[:, None] if EVEN else (k < K)[:, None] & (c < C)[None, :]
        tile = tl.load(x + m[:, None] * C + c[None, :], mask=here, other=0)
        w = tl.load(folded + k[:, None] * C + c[None, :], mask=there, other=0)
        fresh = tl.dot(tile, tl.trans(w), product, input_precision="ieee")
        # WAIT, on Hopper: using the product in every iteration makes the compiler wait for it. Triton allocates one
        # buffer too few for a tile that both products and registers read, and the next copy overwrote data still being
        # read
        product = tl.where(inside[:, None], fresh, 0.0) if WAIT else fresh
        apart = tile.to(tl.float32) - pilot[:, None]
        if not EVEN:
            apart = tl.where((c < C)[None, :], apart, 0.0)
        total += tl.sum(tl.reshape(apart, [ROWS, 8, CHANNELS // 8]), 2)
        squares += tl.sum(tl.reshape(apart * apart, [ROWS, 8, CHANNELS // 8]), 2)
    mean = tl.sum(total, 1) / C
    inverse = tl.rsqrt(tl.sum(squares, 1) / C - mean * mean + eps)
    mean += pilot
    y = inverse[:, None] * (product - mean[:, None] * tl.load(sums + k, mask=k < K, other=0)[None, :])
    y += tl.load(sums + K + k, mask=k < K, other=0)[None, :]
    tl.store(out + m[:, None] * K + k[None, :], y.to(out.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
    if SAVE:
        tl.store(statistics + m, mean, mask=inside)
        tl.store(statistics + rows + m, inverse, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_linear_backward(
    dout, out, x, past, folded, sums, statistics, dx, scaled, parts, rows, C, K,
    ROWS: tl.constexpr, LATENT: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to x, plus (PAST) the gradient of x that bypasses the norm. LayerNorm's two sums over
    channels become products of K numbers, because x reaches the output only through the linear layer:
    sum(dn) = dout . sum(G), sum(dn * norm) = dout . (out - offset).

    For the weight gradients it writes `scaled` = dout * inverse; `parts` [programs, 2, K] receives the sums over rows
    of dout and of scaled * mean.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    inside = m < rows
    at, valid = m[:, None] * K + k[None, :], inside[:, None] & (k < K)[None, :]
    d = tl.load(dout + at, mask=valid, other=0)
    wide = d.to(tl.float32)
    mixed = tl.load(out + at, mask=valid, other=0).to(tl.float32)
    mixed -= tl.load(sums + K + k, mask=k < K, other=0)[None, :]
    plain = tl.sum(wide * tl.load(sums + k, mask=k < K, other=0)[None, :], 1) / C
    along = tl.sum(wide * mixed, 1) / C
    mean = tl.load(statistics + m, mask=inside, other=0)
    inverse = tl.load(statistics + rows + m, mask=inside, other=0)
    ready = (wide * inverse[:, None]).to(scaled.dtype.element_ty)
    tl.store(scaled + at, ready, mask=valid)
    part = parts + tl.program_id(0).to(tl.int64) * 2 * K + k
    tl.store(part, tl.sum(wide, 0), mask=k < K)
    tl.store(part + K, tl.sum(ready.to(tl.float32) * mean[:, None], 0), mask=k < K)
    for first in tl.range(0, C, CHANNELS, num_stages=STAGES):
        c = first + tl.arange(0, CHANNELS)
        here = inside[:, None] if EVEN else inside[:, None] & (c < C)[None, :]
        there = (k < K)[:, None] if EVEN else (k < K)[:, None] & (c < C)[None, :]
        tile = tl.load(x + m[:, None] * C + c[None, :], mask=here, other=0).to(tl.float32)
        dn = tl.dot(d, tl.load(folded + k[:, None] * C + c[None, :], mask=there, other=0), input_precision="ieee")
        normal = (tile - mean[:, None]) * inverse[:, None]
        value = inverse[:, None] * (dn - plain[:, None] - normal * along[:, None])
        if PAST:
            value += tl.load(past + m[:, None] * C + c[None, :], mask=here, other=0).to(tl.float32)
        tl.store(dx + m[:, None] * C + c[None, :], value.to(dx.dtype.element_ty), mask=here)


@triton.jit
def norm_linear_finish(
    product, sums, gain, shift, weight, dgain, dshift, dweight, dbias, C, K,
    CHANNELS: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters: product [K, C] = scaled^T x; sums [2, K] over rows, of dout and of scaled * mean."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.load(gain + c, mask=c < C, other=0).to(tl.float32)[None, :]
    s = tl.load(shift + c, mask=c < C, other=0).to(tl.float32)[None, :]
    gains, shifts = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for first in range(0, K, LATENT):
        k = first + tl.arange(0, LATENT)
        here, at = (k < K)[:, None] & (c < C)[None, :], k[:, None] * C + c[None, :]
        total = tl.load(sums + k, mask=k < K, other=0)
        p = tl.load(product + at, mask=here, other=0).to(tl.float32)
        p -= tl.load(sums + K + k, mask=k < K, other=0)[:, None]
        w = tl.load(weight + at, mask=here, other=0).to(tl.float32)
        tl.store(dweight + at, (p * g + total[:, None] * s).to(dweight.dtype.element_ty), mask=here)
        gains += tl.sum(p * w, 0)
        shifts += tl.sum(total[:, None] * w, 0)
        # all programs have the same values here
        tl.store(dbias + k, total.to(dbias.dtype.element_ty), mask=(k < K) & (tl.program_id(0) + 0 * k == 0))
    tl.store(dgain + c, gains.to(dgain.dtype.element_ty), mask=c < C)
    tl.store(dshift + c, shifts.to(dshift.dtype.element_ty), mask=c < C)


@triton.jit
def linear_residual_finish(
    product, gain, weight, dgain, dweight, C, K, CHANNELS: tl.constexpr, LATENT: tl.constexpr
):  # fmt: skip
    """Gradients of gain [K] and weight [C, K] from product [C, K] = dout^T unit; unit: RMSNorm(y) without gain."""
    k = tl.program_id(0) * LATENT + tl.arange(0, LATENT)
    g = tl.load(gain + k, mask=k < K, other=0).to(tl.float32)[None, :]
    gains = tl.zeros([LATENT], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        here, at = (c < C)[:, None] & (k < K)[None, :], c[:, None] * K + k[None, :]
        p = tl.load(product + at, mask=here, other=0).to(tl.float32)
        tl.store(dweight + at, (p * g).to(dweight.dtype.element_ty), mask=here)
        gains += tl.sum(p * tl.load(weight + at, mask=here, other=0).to(tl.float32), 0)
    tl.store(dgain + k, gains.to(dgain.dtype.element_ty), mask=k < K)


@triton.jit
def linear_residual_fold(
    weight, gain, bias, scale, after, folded, offset, C, K,
    CHANNELS: tl.constexpr, LATENT: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """Fold RMSNorm's gain and LayerScale into the linear layer: folded [C, K] and the bias, offset [C]."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, LATENT)
    valid = (c < C)[:, None] & (k < K)[None, :]
    w = tl.load(weight + c[:, None] * K + k[None, :], mask=valid, other=0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    if NORM:
        w *= tl.load(gain + k, mask=k < K, other=0).to(tl.float32)[None, :]
    if SCALE:
        s = tl.load(scale + c, mask=c < C, other=0).to(tl.float32)
        w *= s[:, None]
        b *= s
    if NEXT:
        b += tl.load(after + c, mask=c < C, other=0).to(tl.float32)
    tl.store(folded + c[:, None] * K + k[None, :], w.to(folded.dtype.element_ty), mask=valid)
    tl.store(offset + c, b, mask=c < C)


@triton.jit(do_not_specialize=["rows", "eps"])
def linear_residual_forward(
    residual, y, folded, offset, out, rows, C, K, share, eps,
    ROWS: tl.constexpr, LATENT: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [M, C] = residual + RMSNorm(y) folded + offset. y [M, K] stays on chip while its rows' channels are computed:
    all of them, or the `share` of this program. RMSNorm's factor of a row is applied to the product.

    EVEN: C is a multiple of CHANNELS. Fusing the next LayerNorm into this launch took 5% longer than a separate launch.
    """
    # programs of the same rows run next to each other because they read the same y
    parts = tl.cdiv(C, share)
    m = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    inside = m < rows
    latent = tl.load(y + m[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
    if NORM:
        wide = latent.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / K + eps)
    begin = tl.program_id(0) % parts * share
    # with num_stages of its own, a loop prefetches everything it reads, not only the operands of the product
    for first in tl.range(begin, tl.minimum(begin + share, C), CHANNELS, num_stages=STAGES):
        c = first + tl.arange(0, CHANNELS)
        at = m[:, None] * C + c[None, :]
        here = inside[:, None] if EVEN else inside[:, None] & (c < C)[None, :]
        there = (k < K)[None, :] if EVEN else (k < K)[None, :] & (c < C)[:, None]
        w = tl.load(folded + c[:, None] * K + k[None, :], mask=there, other=0)
        tokens = tl.load(residual + at, mask=here, other=0, eviction_policy="evict_first")
        branch = tl.dot(latent, tl.trans(w), input_precision="ieee")
        if NORM:
            branch *= factor[:, None]
        branch += tl.load(offset + c, mask=c < C, other=0)[None, :]
        value = (branch + tokens.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + at, value, mask=here)


@triton.jit(do_not_specialize=["rows", "eps"])
def layer_norm_forward(
    x, gain, shift, after, out, rows, C, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """LayerNorm of x - after, [M, C], with whole rows in registers."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    valid = (m < rows)[:, None] & (c < C)[None, :]
    at = m[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=valid, other=0).to(tl.float32)
    value -= tl.load(after + c, mask=c < C, other=0).to(tl.float32)[None, :]
    value = tl.where(valid, value - (tl.sum(value, 1) / C)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    value = value * inverse[:, None] * tl.load(gain + c, mask=c < C, other=0).to(tl.float32)[None, :]
    value += tl.load(shift + c, mask=c < C, other=0).to(tl.float32)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_forward(y, gain, out, rows, K, eps, ROWS: tl.constexpr, LATENT: tl.constexpr):
    """RMSNorm of y [M, K]."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    valid = (m < rows)[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    value = tl.load(y + at, mask=valid, other=0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / K + eps)[:, None]
    value *= tl.load(gain + k, mask=k < K, other=0).to(tl.float32)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_backward(
    dn, y, gain, dy, unit, parts, rows, K, eps,
    ROWS: tl.constexpr, LATENT: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """The gradient of RMSNorm with respect to y [M, K], from dn, the gradient of its output.

    With GAIN, parts [programs, 2, K] get the sums over rows for the gain and of dy. Without it, dn is the gradient of
    the norm before its gain, and that norm is written to `unit`.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LATENT)
    valid = (m < rows)[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    d = tl.load(dn + at, mask=valid, other=0).to(tl.float32)
    value = tl.load(y + at, mask=valid, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / K + eps)[:, None]
    value *= inverse
    part = tl.program_id(0).to(tl.int64) * 2 * K + k
    if GAIN:
        tl.store(parts + part, tl.sum(d * value, 0), mask=k < K)
        d *= tl.load(gain + k, mask=k < K, other=0).to(tl.float32)[None, :]
    else:
        tl.store(unit + at, value.to(unit.dtype.element_ty), mask=valid)
    d = inverse * (d - value * (tl.sum(d * value, 1) / K)[:, None])
    if GAIN:
        tl.store(parts + part + K, tl.sum(d, 0), mask=k < K)
    tl.store(dy + at, d.to(dy.dtype.element_ty), mask=valid)


@triton.jit
def _near(x, mask, image, row, column, dy, dx, c, H, W, C, MASKED: tl.constexpr):
    """x at (row + dy, column + dx), [columns, channels] in float32; zero outside the image."""
    r, w = row + dy, column + dx
    # the mask includes the column bounds; `and` of a scalar and a tile is an integer in the interpreter
    w = tl.where((r >= 0) & (r < H), w, -1)
    there = (w >= 0) & (w < W)
    place = (image * H + r) * W + w
    if MASKED:
        there = there & (tl.load(mask + place, mask=there, other=0) != 0)
    return tl.load(x + place[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0).to(tl.float32)


@triton.jit
def _tap(kernel, dy: tl.constexpr, dx: tl.constexpr, c, C, SIDE: tl.constexpr, FLIP: tl.constexpr):
    """The convolution's weights at (dy, dx), float32 [channels]; the middle one includes the identity."""
    tap = (SIDE - 1 - dy) * SIDE + SIDE - 1 - dx if FLIP else dy * SIDE + dx
    weight = tl.load(kernel + c * SIDE * SIDE + tap, mask=c < C, other=0).to(tl.float32)
    if dy == SIDE // 2:  # noqa: SIM102 - of constants, one by one
        if dx == SIDE // 2:
            weight += 1.0
    return weight


@triton.jit(do_not_specialize=["H", "W", "eps"])
def local_norm_forward(
    x, kernel, bias, gain, mask, out, H, W, C, eps,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """x + depthwise convolution of x (transposed if FLIP), then RMSNorm if NORM, for parts of two rows.

    A program computes two output rows and loads the input they share once: 12 tiles instead of 18 for a 3x3 kernel.
    """
    pairs = tl.cdiv(H, 2)
    pair = tl.program_id(0).to(tl.int64)
    image, row = pair // pairs, pair % pairs * 2
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, CHANNELS)
    half: tl.constexpr = SIDE // 2
    upper = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    if BIAS:
        upper += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)[None, :]
    lower = upper
    for dx in tl.static_range(SIDE):
        for dy in tl.static_range(SIDE + 1):
            near = _near(x, mask, image, row, column, dy - half, dx - half, c, H, W, C, MASKED)
            if dy < SIDE:
                upper += near * _tap(kernel, dy, dx, c, C, SIDE, FLIP)[None, :]
            if dy > 0:
                lower += near * _tap(kernel, dy - 1, dx, c, C, SIDE, FLIP)[None, :]
    if NORM:
        g = tl.load(gain + c, mask=c < C, other=0).to(tl.float32)[None, :]
        upper = upper * tl.rsqrt(tl.sum(upper * upper, 1) / C + eps)[:, None] * g
        lower = lower * tl.rsqrt(tl.sum(lower * lower, 1) / C + eps)[:, None] * g
    place = ((image * H + row) * W + column)[:, None] * C + c[None, :]
    inside = (column < W)[:, None] & (c < C)[None, :]
    tl.store(out + place, upper.to(out.dtype.element_ty), mask=inside)
    # `and` of a scalar and a tile is an integer in the interpreter
    tl.store(out + place + W * C, lower.to(out.dtype.element_ty), mask=inside & (row + 1 + 0 * column < H)[:, None])


@triton.jit(do_not_specialize=["images", "H", "W"])
def local_kernel_gradient(
    x, dy_, mask, parts, images, H, W, C,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's weights from every P-th row: parts [P, C, SIDE * SIDE], to be summed.

    A program handles one row of the kernel. It keeps a sum per weight and column until the end: [TAPS, COLUMNS, C].
    """
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.arange(0, TAPS)
    half: tl.constexpr = SIDE // 2
    total = tl.zeros([TAPS, COLUMNS, CHANNELS], tl.float32)
    line = tl.program_id(0).to(tl.int64)
    while line < images * H:
        image, row = line // H, line % H
        r = row + tl.program_id(1) - half
        first = 0
        while first < W:
            column = first + tl.arange(0, COLUMNS)
            at = ((image * H + row) * W + column)[:, None] * C + c[None, :]
            d = tl.load(dy_ + at, mask=(column < W)[:, None] & (c < C)[None, :], other=0).to(tl.float32)
            w = column[None, :] + tap[:, None] - half
            w = tl.where((r >= 0) & (r < H), w, -1)  # as in _near
            there = (w >= 0) & (w < W) & (tap < SIDE)[:, None]
            place = (image * H + r) * W + w
            if MASKED:
                there = there & (tl.load(mask + place, mask=there, other=0) != 0)
            at = place[:, :, None] * C + c[None, None, :]
            near = tl.load(x + at, mask=there[:, :, None] & (c < C)[None, None, :], other=0).to(tl.float32)
            total += d[None, :, :] * near
            first += COLUMNS
        line += tl.num_programs(0)
    at = (tl.program_id(0) * C + c)[None, :] * SIDE * SIDE + tl.program_id(1) * SIDE + tap[:, None]
    tl.store(parts + at, tl.sum(total, 1), mask=(tap < SIDE)[:, None] & (c < C)[None, :])
