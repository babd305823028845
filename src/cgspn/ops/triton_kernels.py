"""The scan in Triton. A program scans one direction of one image for a few channels, with whole lines in registers.

A line is a tile [M, C'] (positions padded to a power of two, a few channels); `tl.gather` reads the neighbours.
Shape letters as in reference.py. Strides are tuples in elements: batch, row, column, direction, neighbour (0 if a map
lacks either) and channel. Offsets are 64 bits wide.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-7)  # as in reference.py: the sum of the neighbours' sigmoids is clamped below at this
SMALLEST = tl.constexpr(1e-6)  # and n at this


@triton.jit
def _place(H, W, D, groups, codes, CHANNELS: tl.constexpr):
    """The work of this program: image, direction, first channel, vertical, backwards, lines, positions of a line."""
    program = tl.program_id(0)
    d = program % D
    code = (codes >> (2 * d)) & 3
    vertical = code < 2
    lines = tl.where(vertical, H, W)
    positions = tl.where(vertical, W, H)
    group = (program // D) % groups
    return (program // D // groups).to(tl.int64), d, group * CHANNELS, vertical, (code & 1) == 1, lines, positions


@triton.jit
def _walk(strides, vertical, backwards):
    """Strides in elements from a line to the next in the order of the scan, and from a position to the next."""
    down = tl.cast(strides[1], tl.int64)
    right = tl.cast(strides[2], tl.int64)
    step = tl.where(vertical, down, right)
    return tl.where(backwards, -step, step), tl.where(vertical, right, down)


@triton.jit
def _start(p, strides, b, d, j, c, vertical, backwards, line, lines):
    """Addresses of the tile [M, C'] of line `line` of the scan, and the stride to the next line."""
    step, across = _walk(strides, vertical, backwards)
    first = tl.where(backwards, (lines - 1) * tl.abs(step), 0) + line * step
    base = p + b * strides[0] + d.to(tl.int64) * strides[3] + first
    return base + j[:, None].to(tl.int64) * across + c[None, :].to(tl.int64) * strides[5], step


@triton.jit
def _tile(c0, positions, C, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Positions, channels, the mask of valid ones, and the positions of each element's neighbours."""
    j = tl.arange(0, POSITIONS)
    c = c0 + tl.arange(0, CHANNELS)
    valid = (j < positions)[:, None] & (c < C)[None, :]
    to_left = tl.maximum(j - 1, 0)[:, None].broadcast_to(POSITIONS, CHANNELS)
    to_right = tl.minimum(j + 1, POSITIONS - 1)[:, None].broadcast_to(POSITIONS, CHANNELS)
    return j, c, valid, to_left, to_right


@triton.jit
def _surroundings(mask, at, step, across, j, i, positions):
    """Masks [M]: whether the neighbours j-1, j, j+1 on the previous line and the position itself are in the image."""
    valid = j < positions
    here = tl.load(mask + at, mask=valid, other=0) != 0
    before = mask + at - step
    line = i + 0 * j  # in Triton 3.9's interpreter `and` of a scalar and a tensor is an integer, not a boolean
    first = line == 0
    left = first | (tl.load(before - across, mask=valid & (j > 0) & (line > 0), other=0) != 0)
    centre = first | (tl.load(before, mask=valid & (line > 0), other=0) != 0)
    right = first | (tl.load(before + across, mask=(j + 1 < positions) & (line > 0), other=0) != 0)
    left, centre, right = left & here, centre & here, right & here
    return left & (j > 0), centre, right & (j + 1 < positions), here


@triton.jit
def _sigmas(l0, l1, l2, e0, e1, e2):
    """Sigmoids of the logits; zero for neighbours that do not exist."""
    s0 = tl.where(e0[:, None], 1.0 / (1.0 + tl.exp(-l0)), 0.0)
    s1 = tl.where(e1[:, None], 1.0 / (1.0 + tl.exp(-l1)), 0.0)
    s2 = tl.where(e2[:, None], 1.0 / (1.0 + tl.exp(-l2)), 0.0)
    return s0, s1, s2


@triton.jit(do_not_specialize=["H", "W", "C", "D", "groups", "codes", "chunk"])
def scan_forward(
    x, lam, u, logits, keep, mask, y, saved, counted,
    xs, lams, us, ls, ks, ms, ys, saveds, counteds,
    H, W, C, D, groups, codes, chunk,
    NORMALISE: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr, MEAN: tl.constexpr, WRITE: tl.constexpr,
    SAVE: tl.constexpr, STATE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`propagate_2d` (NORMALISE) or `line_scan`: outputs to y (WRITE), the state to `saved` (SAVE).

    MEAN: the state is divided by n, the same scan over ones, which is written to `counted` (SAVE).
    """
    b, d, c0, vertical, backwards, lines, positions = _place(H, W, D, groups, codes, CHANNELS)
    j, c, valid, to_left, to_right = _tile(c0, positions, C, POSITIONS, CHANNELS)
    e0, e1, e2 = (j > 0) & (j < positions), j < positions, j + 1 < positions
    inside = e1

    x_at, x_step = _start(x, xs, b, d, j, c, vertical, backwards, 0, lines)
    lam_at, lam_step = _start(lam, lams, b, d, j, c, vertical, backwards, 0, lines)
    logits_at, logits_step = _start(logits, ls, b, d, j, c, vertical, backwards, 0, lines)
    neighbour = tl.cast(ls[4], tl.int64)
    if NORMALISE:
        u_at, u_step = _start(u, us, b, d, j, c, vertical, backwards, 0, lines)
    if KEEP:
        keep_at, keep_step = _start(keep, ks, b, d, j, c, vertical, backwards, 0, lines)
    if WRITE:
        y_at, y_step = _start(y, ys, b, d, j, c, vertical, backwards, 0, lines)
    if SAVE:
        saved_at, saved_step = _start(saved, saveds, b, d, j, c, vertical, backwards, 0, lines)
        if MEAN:  # n has the layout of the state
            counted_at, _ = _start(counted, counteds, b, d, j, c, vertical, backwards, 0, lines)
    if MASKED:
        m_step, m_across = _walk(ms, vertical, backwards)
        m_at = b * ms[0] + tl.where(backwards, (lines - 1) * tl.abs(m_step), 0) + j.to(tl.int64) * m_across

    h = tl.zeros([POSITIONS, CHANNELS], STATE)
    n = tl.zeros([POSITIONS, CHANNELS], STATE)
    i = 0
    while i < lines:  # not a range: Triton 3.6's interpreter cannot take its end from a value with NumPy 2.4
        w0 = tl.load(logits_at, mask=valid, other=0).to(STATE)
        w1 = tl.load(logits_at + neighbour, mask=valid, other=0).to(STATE)
        w2 = tl.load(logits_at + 2 * neighbour, mask=valid, other=0).to(STATE)
        scale = tl.load(lam_at, mask=valid, other=0).to(STATE)
        drive = scale * tl.load(x_at, mask=valid, other=0).to(STATE)
        if chunk > 0:  # noqa: SIM102 - Triton's `and` would take i % 0 too
            if i % chunk == 0:
                h = tl.zeros([POSITIONS, CHANNELS], STATE)
        left = tl.gather(h, to_left, 0)
        right = tl.gather(h, to_right, 0)
        if NORMALISE:
            if MASKED:
                e0, e1, e2, inside = _surroundings(mask, m_at, m_step, m_across, j, i, positions)
                m_at += m_step
            w0, w1, w2 = _sigmas(w0, w1, w2, e0, e1, e2)
            total = tl.maximum(w0 + w1 + w2, tl.full((), EPSILON, STATE))
            if KEEP:
                total *= 1.0 + tl.exp(-tl.load(keep_at, mask=valid, other=0).to(STATE))
                keep_at += keep_step
            h = drive + (w0 * left + w1 * h + w2 * right) / total
            if MEAN:
                n = scale + (w0 * tl.gather(n, to_left, 0) + w1 * n + w2 * tl.gather(n, to_right, 0)) / total
                n = tl.where(inside[:, None], n, 0.0)
        else:
            h = drive + tl.where(e0[:, None], w0 * left, 0.0) + w1 * h + tl.where(e2[:, None], w2 * right, 0.0)
        h = tl.where(inside[:, None], h, 0.0)
        if SAVE:
            tl.store(saved_at, h, mask=valid)
            saved_at += saved_step
            if MEAN:
                tl.store(counted_at, n, mask=valid)
                counted_at += saved_step
        if WRITE:
            out = h
            if NORMALISE:
                gate = tl.load(u_at, mask=valid, other=0).to(STATE)
                if MEAN:
                    out = h / tl.maximum(n, tl.full((), SMALLEST, STATE))
                out = tl.where(inside[:, None], gate * out, 0.0)
            tl.store(y_at, out.to(y.dtype.element_ty), mask=valid)
            y_at += y_step
        x_at += x_step
        lam_at += lam_step
        logits_at += logits_step
        if NORMALISE:
            u_at += u_step
        i += 1


@triton.jit
def _returned(w0, w1, w2, g, to_left, to_right, has_left, has_right, going):
    """W^T g; zero where the previous line is not read."""
    # position j is the left neighbour of j + 1 and the right neighbour of j - 1
    by_right = tl.gather(w0 * g, to_right, 0)
    by_left = tl.gather(w2 * g, to_left, 0)
    back = w1 * g + tl.where(has_right, by_right, 0.0) + tl.where(has_left, by_left, 0.0)
    return tl.where(going, back, 0.0)


@triton.jit(do_not_specialize=["H", "W", "C", "D", "groups", "codes", "chunk"])
def scan_backward(
    x, lam, u, logits, keep, mask, dy, h, n, dx, dlam, du, dlogits, dkeep,
    xs, lams, us, ls, ks, ms, dys, hs, ns, dxs, dlams, dus, dls, dks,
    H, W, C, D, groups, codes, chunk,
    NORMALISE: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr, MEAN: tl.constexpr,
    STATE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint scan, last line first, from the state `h` that `scan_forward` saved. With MEAN also from n, which is
    one more channel of each group, with x = 1."""
    b, d, c0, vertical, backwards, lines, positions = _place(H, W, D, groups, codes, CHANNELS)
    j, c, valid, to_left, to_right = _tile(c0, positions, C, POSITIONS, CHANNELS)
    has_left = (j > 0)[:, None] & valid
    has_right = (j + 1 < positions)[:, None] & valid
    e0, e1, e2 = (j > 0) & (j < positions), j < positions, j + 1 < positions
    inside = e1

    last = lines - 1
    x_at, x_step = _start(x, xs, b, d, j, c, vertical, backwards, last, lines)
    lam_at, lam_step = _start(lam, lams, b, d, j, c, vertical, backwards, last, lines)
    logits_at, logits_step = _start(logits, ls, b, d, j, c, vertical, backwards, last, lines)
    dy_at, dy_step = _start(dy, dys, b, d, j, c, vertical, backwards, last, lines)
    h_at, h_step = _start(h, hs, b, d, j, c, vertical, backwards, last, lines)
    if MEAN:  # it has the layout of h
        n_at, _ = _start(n, ns, b, d, j, c, vertical, backwards, last, lines)
    dx_at, dx_step = _start(dx, dxs, b, d, j, c, vertical, backwards, last, lines)
    dlam_at, dlam_step = _start(dlam, dlams, b, d, j, c, vertical, backwards, last, lines)
    dlogits_at, dlogits_step = _start(dlogits, dls, b, d, j, c, vertical, backwards, last, lines)
    _, h_across = _walk(hs, vertical, backwards)
    neighbour = tl.cast(ls[4], tl.int64)
    dneighbour = tl.cast(dls[4], tl.int64)
    if NORMALISE:
        u_at, u_step = _start(u, us, b, d, j, c, vertical, backwards, last, lines)
        du_at, du_step = _start(du, dus, b, d, j, c, vertical, backwards, last, lines)
    if KEEP:
        keep_at, keep_step = _start(keep, ks, b, d, j, c, vertical, backwards, last, lines)
        dkeep_at, dkeep_step = _start(dkeep, dks, b, d, j, c, vertical, backwards, last, lines)
    if MASKED:
        m_step, m_across = _walk(ms, vertical, backwards)
        m_at = b * ms[0] + tl.where(backwards, last * tl.abs(m_step), 0) + last * m_step
        m_at += j.to(tl.int64) * m_across

    from_next = tl.zeros([POSITIONS, CHANNELS], STATE)  # W^T g of the next line
    n_from_next = tl.zeros([POSITIONS, CHANNELS], STATE)
    i = lines - 1
    while i >= 0:
        line = i + 0 * j[:, None]  # not a scalar: see _surroundings
        going = line > 0
        if chunk > 0:
            going = going & (line % chunk != 0)
        w0 = tl.load(logits_at, mask=valid, other=0).to(STATE)
        w1 = tl.load(logits_at + neighbour, mask=valid, other=0).to(STATE)
        w2 = tl.load(logits_at + 2 * neighbour, mask=valid, other=0).to(STATE)
        left = tl.load(h_at - h_step - h_across, mask=has_left & going, other=0).to(STATE)
        centre = tl.load(h_at - h_step, mask=valid & going, other=0).to(STATE)
        right = tl.load(h_at - h_step + h_across, mask=has_right & going, other=0).to(STATE)
        g = tl.load(dy_at, mask=valid, other=0).to(STATE)
        if NORMALISE:
            if MASKED:
                e0, e1, e2, inside = _surroundings(mask, m_at, m_step, m_across, j, i, positions)
                m_at -= m_step
            here = tl.load(h_at, mask=valid, other=0).to(STATE)
            gate = tl.load(u_at, mask=valid, other=0).to(STATE)
            if MEAN:
                count = tl.load(n_at, mask=valid, other=0).to(STATE)
                small = count < tl.full((), SMALLEST, STATE)
                count = tl.maximum(count, tl.full((), SMALLEST, STATE))
                here = here / count
                n_g = tl.where(small, 0.0, -gate * here * g / count)
                n_g = tl.where(inside[:, None], n_g + n_from_next, 0.0)
                gate = gate / count
            tl.store(du_at, tl.where(inside[:, None], here * g, 0.0).to(du.dtype.element_ty), mask=valid)
            g = g * gate
        g = tl.where(inside[:, None], g + from_next, 0.0)
        dlam_out = g * tl.load(x_at, mask=valid, other=0).to(STATE)
        if MEAN:
            dlam_out += n_g
        dlam_out = tl.where(inside[:, None], dlam_out, 0.0)
        dx_out = tl.where(inside[:, None], g * tl.load(lam_at, mask=valid, other=0).to(STATE), 0.0)
        tl.store(dlam_at, dlam_out.to(dlam.dtype.element_ty), mask=valid)
        tl.store(dx_at, dx_out.to(dx.dtype.element_ty), mask=valid)
        if NORMALISE:
            w0, w1, w2 = _sigmas(w0, w1, w2, e0, e1, e2)
            total = w0 + w1 + w2
            least = tl.full((), EPSILON, STATE)  # as a plain constant it would be a float32, whatever the state
            clamped = total <= least
            total = tl.maximum(total, least)
            mean = (w0 * left + w1 * centre + w2 * right) / total
            mixed = g * mean
            if MEAN:
                n_left = tl.load(n_at - h_step - h_across, mask=has_left & going, other=0).to(STATE)
                n_centre = tl.load(n_at - h_step, mask=valid & going, other=0).to(STATE)
                n_right = tl.load(n_at - h_step + h_across, mask=has_right & going, other=0).to(STATE)
                n_mean = (w0 * n_left + w1 * n_centre + w2 * n_right) / total
                mixed += n_g * n_mean
            if KEEP:
                kept = 1.0 / (1.0 + tl.exp(-tl.load(keep_at, mask=valid, other=0).to(STATE)))
                dkeep_out = tl.where(inside[:, None], mixed * kept * (1.0 - kept), 0.0)
                tl.store(dkeep_at, dkeep_out.to(dkeep.dtype.element_ty), mask=valid)
                g = tl.where(inside[:, None], g * kept, 0.0)
                if MEAN:
                    n_g = tl.where(inside[:, None], n_g * kept, 0.0)
                keep_at -= keep_step
                dkeep_at -= dkeep_step
            g = g / total
            # d(sigma_k / total) gives neighbour k minus the mean; where the total is clamped, the neighbour alone
            mean = tl.where(clamped, 0.0, mean)
            d0 = g * (left - mean)
            d1 = g * (centre - mean)
            d2 = g * (right - mean)
            if MEAN:
                n_g = n_g / total
                n_mean = tl.where(clamped, 0.0, n_mean)
                d0 += n_g * (n_left - n_mean)
                d1 += n_g * (n_centre - n_mean)
                d2 += n_g * (n_right - n_mean)
                n_from_next = _returned(w0, w1, w2, n_g, to_left, to_right, has_left, has_right, going)
                n_at -= h_step
            d0 *= w0 * (1.0 - w0)
            d1 *= w1 * (1.0 - w1)
            d2 *= w2 * (1.0 - w2)
        else:
            d0 = g * left
            d1 = g * centre
            d2 = g * right
        tl.store(dlogits_at, d0.to(dlogits.dtype.element_ty), mask=valid)
        tl.store(dlogits_at + dneighbour, d1.to(dlogits.dtype.element_ty), mask=valid)
        tl.store(dlogits_at + 2 * dneighbour, d2.to(dlogits.dtype.element_ty), mask=valid)
        from_next = _returned(w0, w1, w2, g, to_left, to_right, has_left, has_right, going)
        x_at -= x_step
        lam_at -= lam_step
        logits_at -= logits_step
        dy_at -= dy_step
        h_at -= h_step
        dx_at -= dx_step
        dlam_at -= dlam_step
        dlogits_at -= dlogits_step
        if NORMALISE:
            u_at -= u_step
            du_at -= du_step
        i -= 1
