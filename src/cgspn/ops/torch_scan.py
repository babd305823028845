"""The PyTorch backend: the recurrence line by line, directions with lines of one length in the same operation.

Runs on any device PyTorch runs on. All work on a line (normalisation, recurrence, gate, gradients) is done while it is
in the cache, and on a square grid the four directions share every operation: on small grids calling an operation
costs more than its arithmetic. The backward keeps nothing from the forward: it scans again.
Sums, state and normalisation are float32, or float64 where the inputs are.

Shapes: G directions go together; a line of all of them is [G, B, M, C] and the weights of its three neighbours
[3, G, B, M, C]. States carry a zero at either end, [G, B, M + 2, C], so that neighbours are a view of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import DIRECTIONS, EPSILON


def _state_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class _Group:
    """Directions that are scanned together, and where each of them finds line number `step` of its scan."""

    def __init__(self, codes: Sequence[int], members: Sequence[int], shape: Sequence[int]):
        self.members = list(members)  # positions in `codes`, and so in dimension D of the parameters
        names = [DIRECTIONS[codes[d]] for d in self.members]
        self.axes = [1 if name in ("down", "up") else 2 for name in names]
        self.ahead = [name in ("down", "right") for name in names]
        self.count = shape[self.axes[0]]

    def maps(self, t: Tensor) -> list[Tensor]:
        """[B, H, W, D, ...] -> the map [B, H, W, ...] of each direction of the group."""
        return [t.select(3, d) for d in self.members]

    def shared(self, t: Tensor) -> list[Tensor]:
        """A map [B, H, W, ...] that all directions of the group read or add to."""
        return [t] * len(self.members)

    def lines(self, maps: Iterable[Tensor], step: int) -> list[Tensor]:
        """Views [B, M, ...] of line `step` of each map."""
        behind = self.count - 1 - step
        return [t.select(axis, step if up else behind) for t, axis, up in zip(maps, self.axes, self.ahead, strict=True)]

    def read(self, maps: Iterable[Tensor], step: int, dtype: torch.dtype) -> Tensor:
        """Line `step` of each map, [G, B, M, ...]."""
        return torch.stack(self.lines(maps, step)).to(dtype)

    def write(self, maps: Iterable[Tensor], step: int, line: Tensor) -> None:
        """The inverse of `read`."""
        for out, t in zip(self.lines(maps, step), line, strict=True):
            out.copy_(t)

    def add(self, total: Tensor, step: int, line: Tensor) -> None:
        """Add line `step` of each direction to the one map they share."""
        for out, t in zip(self.lines(self.shared(total), step), line, strict=True):
            out.add_(t)


def _groups(codes: Sequence[int], shape: Sequence[int]) -> list[_Group]:
    everything = range(len(codes))
    if shape[1] == shape[2]:
        return [_Group(codes, everything, shape)]
    vertical = [d for d in everything if DIRECTIONS[codes[d]] in ("down", "up")]
    horizontal = [d for d in everything if d not in vertical]
    return [_Group(codes, members, shape) for members in (vertical, horizontal) if members]


def _padded(line: Tensor) -> Tensor:
    return torch.nn.functional.pad(line, (0, 0, 1, 1))


def _neighbours(padded: Tensor) -> Tensor:
    """[G, B, M + 2, C] -> its view [3, G, B, M, C]: positions j-1, j, j+1."""
    return padded.unfold(2, 3, 1).movedim(-1, 0)


def _mix(weights: Tensor, padded: Tensor) -> Tensor:
    """W h for the state of the line before."""
    left, centre, right = _neighbours(padded)
    return torch.mul(weights[1], centre).addcmul_(weights[0], left).addcmul_(weights[2], right)


def _spread(weights: Tensor, q: Tensor) -> Tensor:
    """W^T q: what every position gets back from those on the next line that read it."""
    out = weights[1] * q
    out[:, :, :-1].addcmul_(weights[0, :, :, 1:], q[:, :, 1:])
    out[:, :, 1:].addcmul_(weights[2, :, :, :-1], q[:, :, :-1])
    return out


class _Line(NamedTuple):
    """One line of `propagate_2d`, as forward and backward need it."""

    outside: Tensor | None  # [G, B, M, 1] bool: padding
    sigma: Tensor  # [3, G, B, M, C], zero where there is no neighbour
    total: Tensor  # their sum, clamped
    mean: Tensor  # W h of the line before
    before: Tensor  # padded state of the line before
    state: Tensor  # padded state of this line


def _scan(group: _Group, x: Tensor, logits: Tensor, lam: Tensor, mask: Tensor | None) -> Iterator[_Line]:
    dtype = _state_dtype(x)
    xs, scales, scores = group.shared(x), group.maps(lam), group.maps(logits)
    state = outside = outside_before = None
    for step in range(group.count):
        sigma = torch.stack([t.movedim(2, 0) for t in group.lines(scores, step)], 1).to(dtype).sigmoid_()
        sigma[0, :, :, 0] = 0.0
        sigma[2, :, :, -1] = 0.0
        if mask is not None:
            outside_before = outside
            outside = ~group.read(group.shared(mask), step, torch.bool)[..., None]
            missing = outside if outside_before is None else outside | _neighbours(_padded(outside_before))
            sigma.masked_fill_(missing, 0.0)
        total = (sigma[0] + sigma[1]).add_(sigma[2]).clamp_(min=EPSILON)
        drive = group.read(scales, step, dtype).mul_(group.read(xs, step, dtype))
        before = _padded(torch.zeros_like(drive)) if state is None else state
        mean = _mix(sigma, before).div_(total)
        h = drive.add_(mean)
        if outside is not None:
            h.masked_fill_(outside, 0.0)
        state = _padded(h)
        yield _Line(outside, sigma, total, mean, before, state)


def _gated(line: _Line, t: Tensor, gate: Tensor) -> Tensor:
    """gate * t, and zero in the padding, which may hold anything, NaN included."""
    out = t * gate
    return out if line.outside is None else out.masked_fill_(line.outside, 0.0)


def forward(
    x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, mask: Tensor | None, directions: Sequence[int], merge_sum: bool
) -> Tensor:
    """`propagate_2d` without checks. Shapes as there; `directions` are indices into DIRECTIONS."""
    dtype = _state_dtype(x)
    y = x.new_zeros(x.shape, dtype=dtype) if merge_sum else x.new_empty(u.shape)
    for group in _groups(directions, x.shape):
        gates = group.maps(u)
        for step, line in enumerate(_scan(group, x, logits, lam, mask)):
            out = _gated(line, line.state[:, :, 1:-1], group.read(gates, step, dtype))
            if merge_sum:
                group.add(y, step, out)
            else:
                group.write(group.maps(y), step, out)
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
    dx = x.new_zeros(x.shape, dtype=dtype)
    dlogits, dlam, du = logits.new_empty(logits.shape), lam.new_empty(lam.shape), u.new_empty(u.shape)
    for group in _groups(directions, x.shape):
        xs, scales, gates = group.shared(x), group.maps(lam), group.maps(u)
        dys = group.shared(dy) if merge_sum else group.maps(dy)
        lines = list(_scan(group, x, logits, lam, mask))
        from_next: Tensor | None = None  # W^T g of the line that follows
        for step in range(group.count - 1, -1, -1):
            line = lines.pop()
            grad = group.read(dys, step, dtype)
            group.write(group.maps(du), step, _gated(line, line.state[:, :, 1:-1], grad))
            g = _gated(line, grad, group.read(gates, step, dtype))
            if from_next is not None:
                g += from_next
            group.write(group.maps(dlam), step, _gated(line, g, group.read(xs, step, dtype)))
            group.add(dx, step, _gated(line, g, group.read(scales, step, dtype)))
            q = g.div_(line.total)
            from_next = _spread(line.sigma, q)
            # d(sigma_k / total) gives neighbour k minus the mean; where the total is clamped, the neighbour alone
            centre = line.mean.masked_fill_(line.total <= EPSILON, 0.0)
            dsigma = torch.sub(_neighbours(line.before), centre, out=torch.empty_like(line.sigma)).mul_(q)
            dlines = torch.ops.aten.sigmoid_backward(dsigma, line.sigma)
            for out, t in zip(group.lines(group.maps(dlogits), step), dlines.unbind(1), strict=True):
                out.copy_(t.movedim(0, 2))
    return dx.to(x.dtype), dlogits, dlam, du


def _restarts(step: int, chunk: int | None) -> bool:
    return step == 0 or (chunk is not None and step % chunk == 0)


def _scan_given(
    group: _Group, x: Tensor, weights: Tensor, lam: Tensor, chunk: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For every line of `line_scan`: its weights [3, 1, B, M, C], the padded state before it and its own."""
    dtype = _state_dtype(x)
    state: Tensor | None = None
    for step in range(group.count):
        taken = group.read([weights], step, dtype).movedim(3, 0)
        h = group.read([lam], step, dtype).mul_(group.read([x], step, dtype))
        before = _padded(torch.zeros_like(h)) if state is None or _restarts(step, chunk) else state
        state = _padded(h.add_(_mix(taken, before)))
        yield taken, before, state


def line_scan_forward(x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None) -> Tensor:
    """`line_scan` without checks. Shapes as there."""
    group = _Group([direction], [0], x.shape)
    out = x.new_empty(x.shape)
    for step, (_, _, state) in enumerate(_scan_given(group, x, weights, lam, chunk)):
        group.write([out], step, state[:, :, 1:-1])
    return out


def line_scan_backward(
    dh: Tensor, x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `line_scan_forward` to x, weights and lam."""
    dtype = _state_dtype(x)
    group = _Group([direction], [0], x.shape)
    dx, dweights, dlam = x.new_empty(x.shape), weights.new_empty(weights.shape), lam.new_empty(lam.shape)
    lines = list(_scan_given(group, x, weights, lam, chunk))
    from_next: Tensor | None = None
    for step in range(group.count - 1, -1, -1):
        taken, before, _ = lines.pop()
        g = group.read([dh], step, dtype)
        if from_next is not None:
            g = g + from_next
        group.write([dx], step, g * group.read([lam], step, dtype))
        group.write([dlam], step, g * group.read([x], step, dtype))
        group.write([dweights], step, (_neighbours(before) * g).movedim(0, 3))
        from_next = None if _restarts(step, chunk) else _spread(taken, g)
    return dx, dweights, dlam
