"""The PyTorch backend: the same recurrence with every line-independent part vectorised, forward and backward.

Runs on any device PyTorch runs on. The loop over lines does three fused multiply-adds a line; normalisation, gates
and their gradients are whole-map operations. The backward keeps nothing from the forward: it scans again.
Sums, state and normalisation are float32, or float64 where the inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import DIRECTIONS, EPSILON


def _axis_and_order(direction: str, shape: Sequence[int]) -> tuple[int, range]:
    axis = 1 if direction in ("down", "up") else 2
    count = shape[axis]
    return axis, range(count) if direction in ("down", "right") else range(count - 1, -1, -1)


def _state_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _scan(weights: Tensor, drive: Tensor, direction: str, chunk: int | None = None) -> Tensor:
    """h[i] = W[i] h[i-1] + drive[i]. weights [B, H, W, 3, C], drive [B, H, W, C], both in the state's dtype."""
    axis, order = _axis_and_order(direction, drive.shape)
    h = torch.empty_like(drive)
    before: Tensor | None = None
    for step, i in enumerate(order):
        now = h.select(axis, i)
        now.copy_(drive.select(axis, i))
        if before is not None and not (chunk and step % chunk == 0):
            left, centre, right = weights.select(axis, i).unbind(2)
            now.addcmul_(centre, before)
            now[:, 1:].addcmul_(left[:, 1:], before[:, :-1])
            now[:, :-1].addcmul_(right[:, :-1], before[:, 1:])
        before = now
    return h


def _scan_adjoint(weights: Tensor, dh: Tensor, direction: str, chunk: int | None = None) -> Tensor:
    """g[i] = dh[i] + W[i+1]^T g[i+1]: what reaches each line's state from all that follow it."""
    axis, order = _axis_and_order(direction, dh.shape)
    g = torch.empty_like(dh)
    after: Tensor | None = None
    previous = -1
    for step in range(len(order) - 1, -1, -1):
        now = g.select(axis, order[step])
        now.copy_(dh.select(axis, order[step]))
        if after is not None and not (chunk and (step + 1) % chunk == 0):
            left, centre, right = weights.select(axis, previous).unbind(2)
            now.addcmul_(centre, after)
            now[:, :-1].addcmul_(left[:, 1:], after[:, 1:])
            now[:, 1:].addcmul_(right[:, :-1], after[:, :-1])
        after, previous = now, order[step]
    return g


def _line_before(t: Tensor, direction: str, fill: float | bool = 0.0) -> Tensor:
    """The map whose line i is line i-1 of `t` in the order of the scan; `fill` on the first line."""
    axis, _ = _axis_and_order(direction, t.shape)
    out = torch.full_like(t, fill)
    n = t.shape[axis] - 1
    if direction in ("down", "right"):
        out.narrow(axis, 1, n).copy_(t.narrow(axis, 0, n))
    else:
        out.narrow(axis, 0, n).copy_(t.narrow(axis, 1, n))
    return out


def _neighbours(t: Tensor, direction: str) -> Tensor:
    """[B, H, W, ...] -> [B, H, W, 3, ...]: positions j-1, j, j+1 along the line; zero (False) outside."""
    across = 2 if direction in ("down", "up") else 1
    out = torch.zeros((*t.shape[:3], 3, *t.shape[3:]), dtype=t.dtype, device=t.device)
    n = t.shape[across] - 1
    out.select(3, 0).narrow(across, 1, n).copy_(t.narrow(across, 0, n))
    out.select(3, 1).copy_(t)
    out.select(3, 2).narrow(across, 0, n).copy_(t.narrow(across, 1, n))
    return out


def _exists(mask: Tensor | None, shape: Sequence[int], direction: str, device: torch.device) -> Tensor:
    """[B or 1, H, W, 3, 1] bool: which neighbours on the line before take part. All False where the mask is."""
    if mask is None:
        line = torch.ones((1, *shape[1:3]), dtype=torch.bool, device=device)
        return _neighbours(line, direction)[..., None]
    exists = _neighbours(_line_before(mask, direction, fill=True), direction)
    return (exists & mask[..., None])[..., None]


def _normalise(logits: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row-stochastic weights, the sigmoids they come from (zero where no neighbour exists) and their sum."""
    sigma = torch.sigmoid(logits).masked_fill_(~exists, 0.0)
    total = sigma.sum(3, keepdim=True)
    return sigma / total.clamp(min=EPSILON), sigma, total


def forward(
    x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, mask: Tensor | None, directions: Sequence[int], merge_sum: bool
) -> Tensor:
    """`propagate_2d` without checks. Shapes as there; `directions` are indices into DIRECTIONS."""
    dtype = _state_dtype(x)
    outside = None if mask is None else ~mask[..., None]
    xs = x.to(dtype)
    y = x.new_zeros(x.shape, dtype=dtype) if merge_sum else x.new_empty(u.shape)
    for d, code in enumerate(directions):
        name = DIRECTIONS[code]
        weights, _, _ = _normalise(logits[:, :, :, d].to(dtype), _exists(mask, x.shape, name, x.device))
        drive = lam[:, :, :, d].to(dtype) * xs
        if outside is not None:
            drive.masked_fill_(outside, 0.0)
        out = u[:, :, :, d].to(dtype) * _scan(weights, drive, name)
        if outside is not None:
            out.masked_fill_(outside, 0.0)
        if merge_sum:
            y += out
        else:
            y[:, :, :, d] = out
    return y.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` to x, logits, lam and u, each in its input's dtype and shape."""
    dtype = _state_dtype(x)
    outside = None if mask is None else ~mask[..., None]
    xs = x.to(dtype)
    dx = torch.zeros_like(xs)
    dlogits, dlam, du = logits.new_empty(logits.shape), lam.new_empty(lam.shape), u.new_empty(u.shape)
    for d, code in enumerate(directions):
        name = DIRECTIONS[code]
        gate, scale = u[:, :, :, d].to(dtype), lam[:, :, :, d].to(dtype)
        exists = _exists(mask, x.shape, name, x.device)
        weights, sigma, total = _normalise(logits[:, :, :, d].to(dtype), exists)
        drive = scale * xs
        if outside is not None:
            drive.masked_fill_(outside, 0.0)
        h = _scan(weights, drive, name)
        grad = (dy if merge_sum else dy[:, :, :, d]).to(dtype)
        dh = gate * grad
        if outside is not None:
            dh.masked_fill_(outside, 0.0)
        g = _scan_adjoint(weights, dh, name)
        contributions = [h * grad, g * xs, g * scale]
        if outside is not None:  # the padding may hold anything, infinities and NaN included
            contributions = [t.masked_fill_(outside, 0.0) for t in contributions]
        du[:, :, :, d], dlam[:, :, :, d] = contributions[:2]
        dx += contributions[2]
        dweights = g.unsqueeze(3) * _neighbours(_line_before(h, name), name)
        # w = sigma / max(total, eps): the sum carries a gradient only where it is not clamped
        shared = (dweights * weights).sum(3, keepdim=True).masked_fill_(total <= EPSILON, 0.0)
        dlog = (dweights - shared) / total.clamp(min=EPSILON) * sigma * (1 - sigma)
        dlogits[:, :, :, d] = dlog.masked_fill_(~exists, 0.0)
    return dx.to(x.dtype), dlogits, dlam, du


def line_scan_forward(x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None) -> Tensor:
    """`line_scan` without checks. Shapes as there."""
    dtype = _state_dtype(x)
    return _scan(weights.to(dtype), lam.to(dtype) * x.to(dtype), DIRECTIONS[direction], chunk).to(x.dtype)


def line_scan_backward(
    dh: Tensor, x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `line_scan_forward` to x, weights and lam."""
    dtype = _state_dtype(x)
    name = DIRECTIONS[direction]
    xs, ws, ls = x.to(dtype), weights.to(dtype), lam.to(dtype)
    h = _scan(ws, ls * xs, name, chunk)
    g = _scan_adjoint(ws, dh.to(dtype), name, chunk)
    before = _line_before(h, name)
    if chunk:
        axis, order = _axis_and_order(name, x.shape)
        before.index_fill_(axis, torch.tensor(list(order)[::chunk], device=x.device), 0.0)
    dweights = g.unsqueeze(3) * _neighbours(before, name)
    return (g * ls).to(x.dtype), dweights.to(weights.dtype), (g * xs).to(lam.dtype)
