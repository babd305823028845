"""The scan in Triton. A program scans one direction of one image for a few channels, with whole lines in registers.

A line is a tile [M, C'] (positions padded to a power of two, a few channels); `tl.gather` reads the neighbours. A map
is a matrix with a row for each position and direction, [B * H * W * D, C], or [B * H * W, C] if directions share it. It
has one stride, that of its rows. Shape letters as in reference.py. Offsets are 64 bits wide.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-7)  # as in reference.py: the sum of the neighbours' sigmoids is clamped below at this


@triton.jit
def _place(H, W, D, groups, codes, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """The work of this program: direction, position and channel indices, number of lines, positions per line, the
    places b * H * W + row * W + column of the first line, and the strides from line to line and from position to
    position."""
    program = tl.program_id(0)
    d = program % D
    code = (codes >> (2 * d)) & 3
    vertical = code < 2
    lines = tl.where(vertical, H, W)
    j = tl.arange(0, POSITIONS)
    c = (program // D) % groups * CHANNELS + tl.arange(0, CHANNELS)
    step = tl.where(vertical, W, 1)
    across = tl.where(vertical, 1, W)
    backwards = (code & 1) == 1
    place = (program // D // groups).to(tl.int64) * H * W + tl.where(backwards, (lines - 1) * step, 0)
    place += j.to(tl.int64) * across
    return d, j, c, lines, tl.where(vertical, W, H), place, tl.where(backwards, -step, step).to(tl.int64), across


@triton.jit
def _load(p, row, stride, c, valid, STATE: tl.constexpr):
    """Load a tile of the matrix at p."""
    return tl.load(p + (row * stride)[:, None] + c[None, :], mask=valid, other=0).to(STATE)


@triton.jit
def _store(p, row, C, c, valid, value):
    """Write a tile of a contiguous matrix [rows, C] at p."""
    tl.store(p + (row * C)[:, None] + c[None, :], value.to(p.dtype.element_ty), mask=valid)


@triton.jit
def _weights(
    logits, row, stride, neighbour, c, valid, has_left, has_right, NORMALISE: tl.constexpr, STATE: tl.constexpr
):
    """Weights of the neighbours (NORMALISE: sigmoids of the logits), zero for those that do not exist."""
    w0 = _load(logits, row, stride, c, valid, STATE)
    w1 = _load(logits + neighbour, row, stride, c, valid, STATE)
    w2 = _load(logits + 2 * neighbour, row, stride, c, valid, STATE)
    if NORMALISE:
        w0, w1, w2 = 1.0 / (1.0 + tl.exp(-w0)), 1.0 / (1.0 + tl.exp(-w1)), 1.0 / (1.0 + tl.exp(-w2))
    return tl.where(has_left, w0, 0.0), w1, tl.where(has_right, w2, 0.0)


@triton.jit(do_not_specialize=["H", "W", "C", "D", "groups", "codes", "chunk", "each"])
def scan_forward(
    x, lam, u, logits, keep, y, saved, strides, neighbour, H, W, C, D, groups, codes, chunk, each,
    OWN: tl.constexpr, NORMALISE: tl.constexpr, KEEP: tl.constexpr, SAVE: tl.constexpr,
    STATE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`propagate_2d` (NORMALISE) or `line_scan`: writes outputs to y, or with SAVE the state to `saved`.

    strides: of the rows of x, lam, u, logits and keep. OWN: each direction has separate features. each: channels per
    parameter group.
    """
    d, j, c, lines, positions, place, step, _ = _place(H, W, D, groups, codes, POSITIONS, CHANNELS)
    valid = (j < positions)[:, None] & (c < C)[None, :]
    k = c // each  # the group of each channel
    has_left, has_right = (j > 0)[:, None] & valid, (j + 1 < positions)[:, None] & valid
    to_left = tl.maximum(j - 1, 0)[:, None].broadcast_to(POSITIONS, CHANNELS)
    to_right = tl.minimum(j + 1, POSITIONS - 1)[:, None].broadcast_to(POSITIONS, CHANNELS)
    h = tl.zeros([POSITIONS, CHANNELS], STATE)
    i = 0
    while i < lines:  # not a range: Triton 3.6's interpreter cannot take its end from a value with NumPy 2.4
        row = place * D + d
        w0, w1, w2 = _weights(
            logits, row, strides[3], neighbour, k, valid, has_left, has_right, NORMALISE, STATE
        )  # fmt: skip
        drive = _load(lam, row, strides[1], k, valid, STATE)
        drive *= _load(x, row if OWN else place, strides[0], c, valid, STATE)
        if chunk > 0:  # noqa: SIM102 - Triton's `and` would take i % 0 too
            if i % chunk == 0:
                h = tl.zeros([POSITIONS, CHANNELS], STATE)
        mix = w0 * tl.gather(h, to_left, 0) + w1 * h + w2 * tl.gather(h, to_right, 0)
        if NORMALISE:
            total = tl.maximum(w0 + w1 + w2, tl.full((), EPSILON, STATE))
            if KEEP:
                total *= 1.0 + tl.exp(-_load(keep, row, strides[4], k, valid, STATE))
            mix = mix / total
        h = tl.where(valid, drive + mix, 0.0)
        if SAVE:
            _store(saved, row, C, c, valid, h)
        else:
            out = h
            if NORMALISE:
                out = h * _load(u, row, strides[2], k, valid, STATE)
            _store(y, row, C, c, valid, out)
        place += step
        i += 1


@triton.jit(do_not_specialize=["H", "W", "C", "D", "groups", "codes", "chunk", "each"])
def scan_backward(
    x, lam, u, logits, keep, dy, h, dx, dlam, du, dlogits, dkeep,
    strides, neighbour, H, W, C, D, groups, codes, chunk, each,
    OWN: tl.constexpr, MERGED: tl.constexpr, NORMALISE: tl.constexpr, KEEP: tl.constexpr,
    STATE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint scan, last line first, from the state h that `scan_forward` saved. Gradients are for each channel.

    strides: as in `scan_forward`, then of the rows of dy. MERGED: the directions share dy.
    """
    d, j, c, lines, positions, place, step, across = _place(H, W, D, groups, codes, POSITIONS, CHANNELS)
    valid = (j < positions)[:, None] & (c < C)[None, :]
    k = c // each  # the group of each channel
    has_left, has_right = (j > 0)[:, None] & valid, (j + 1 < positions)[:, None] & valid
    to_left = tl.maximum(j - 1, 0)[:, None].broadcast_to(POSITIONS, CHANNELS)
    to_right = tl.minimum(j + 1, POSITIONS - 1)[:, None].broadcast_to(POSITIONS, CHANNELS)
    place += (lines - 1) * step
    from_next = tl.zeros([POSITIONS, CHANNELS], STATE)  # W^T g of the next line
    i = lines - 1
    while i >= 0:
        row = place * D + d
        line = i + 0 * j[:, None]  # in Triton 3.9's interpreter `and` of a scalar and a tensor is an integer
        going = line > 0  # the previous line is read
        if chunk > 0:
            going = going & (line % chunk != 0)
        before = row - step * D
        left = _load(h, before - across * D, C, c, has_left & going, STATE)
        centre = _load(h, before, C, c, valid & going, STATE)
        right = _load(h, before + across * D, C, c, has_right & going, STATE)
        g = _load(dy, place if MERGED else row, strides[5], c, valid, STATE)
        if NORMALISE:
            _store(du, row, C, c, valid, g * _load(h, row, C, c, valid, STATE))
            g *= _load(u, row, strides[2], k, valid, STATE)
        g += from_next
        _store(dlam, row, C, c, valid, g * _load(x, row if OWN else place, strides[0], c, valid, STATE))
        _store(dx, row, C, c, valid, g * _load(lam, row, strides[1], k, valid, STATE))
        w0, w1, w2 = _weights(
            logits, row, strides[3], neighbour, k, valid, has_left, has_right, NORMALISE, STATE
        )  # fmt: skip
        if NORMALISE:
            total = w0 + w1 + w2
            least = tl.full((), EPSILON, STATE)  # a plain constant would be float32 for any state
            clamped = total <= least
            total = tl.maximum(total, least)
            mean = (w0 * left + w1 * centre + w2 * right) / total
            if KEEP:
                kept = 1.0 / (1.0 + tl.exp(-_load(keep, row, strides[4], k, valid, STATE)))
                _store(dkeep, row, C, c, valid, g * mean * kept * (1.0 - kept))
                g *= kept
            g = g / total
            # the gradient of sigma_k / total is neighbour k minus the mean, or the neighbour itself if the total is
            # clamped
            mean = tl.where(clamped, 0.0, mean)
            left = (left - mean) * w0 * (1.0 - w0)
            centre = (centre - mean) * w1 * (1.0 - w1)
            right = (right - mean) * w2 * (1.0 - w2)
        _store(dlogits, 3 * row, C, c, valid, g * left)
        _store(dlogits, 3 * row + 1, C, c, valid, g * centre)
        _store(dlogits, 3 * row + 2, C, c, valid, g * right)
        # position j is the left neighbour of j + 1 and the right neighbour of j - 1
        by_right, by_left = tl.gather(w0 * g, to_right, 0), tl.gather(w2 * g, to_left, 0)
        back = w1 * g + tl.where(has_right, by_right, 0.0) + tl.where(has_left, by_left, 0.0)
        from_next = tl.where(valid & going, back, 0.0)
        place -= step
        i -= 1
