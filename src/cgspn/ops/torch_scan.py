"""The PyTorch backend. The recurrence runs line by line; all other arithmetic runs on slabs of several lines.

It runs on any device that PyTorch supports. On small grids the overhead of an operation exceeds its arithmetic, so each
line takes only two: the weighted sum of its neighbours and an addition. Everything that does not depend on the previous
line (sigmoid, normalisation, products with lam and u, most gradients) is computed for as many lines as fit in the
cache. On a square grid the four directions share every operation. The backward recomputes the scan and needs nothing
from the forward. Sums, state and normalisation are float32, or float64 for float64 inputs.

Shapes: G directions are computed together. A slab of n lines is [n, G, B, M, C], the weights of the three neighbours
[3, n, G, B, M, C]. States are padded with a zero at each end and begin with the state before the first line:
[n + 1, G, B, M + 2, C]. The neighbours are views of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arguments import Scan
from .param_groups import per_channel, per_set
from .reference import DIRECTIONS, EPSILON, SMALLEST

# most weights in a slab: their 4 MiB fit in the cache of a core or its share of the last level
SLAB = 1 << 20


class _Group:
    """Directions that are scanned together, with access to the lines of each."""

    def __init__(self, codes: Sequence[int], members: Sequence[int], shape: Sequence[int]):
        self.members = list(members)  # positions in `codes`, and so in dimension D of the parameters
        names = [DIRECTIONS[codes[d]] for d in self.members]
        self.axes = [1 if name in ("down", "up") else 2 for name in names]
        self.ahead = [name in ("down", "right") for name in names]
        self.count = shape[self.axes[0]]
        line = 3 * len(self.members) * shape[0] * shape[3 - self.axes[0]] * shape[3]
        self.most = max(1, SLAB // max(1, line))  # lines of a slab

    def maps(self, t: Tensor) -> list[Tensor]:
        """[B, H, W, D, ...] -> the map [B, H, W, ...] of each direction of the group."""
        return [t.select(3, d) for d in self.members]

    def shared(self, t: Tensor) -> list[Tensor]:
        """For each direction of the group, the view of a map [B, H, W, ...] that they all read or add to."""
        return [t] * len(self.members)

    def features(self, x: Tensor) -> list[Tensor]:
        """The features that each direction scans, from [B, H, W, C] or [B, H, W, D, C]."""
        return self.maps(x) if x.dim() == 5 else self.shared(x)

    def slabs(self) -> list[range]:
        """The steps of the scan, divided into slabs."""
        return [range(k, min(k + self.most, self.count)) for k in range(0, self.count, self.most)]

    def _lines(self, maps: Iterable[Tensor], steps: range) -> list[Tensor]:
        """Views [n, B, M, ...] of the lines of some steps in each map, in the order of the map, not of the scan."""
        found = []
        for t, axis, ahead in zip(maps, self.axes, self.ahead, strict=True):
            start = steps.start if ahead else self.count - steps.stop
            found.append(t.narrow(axis, start, len(steps)).movedim(axis, 0))
        return found

    def _turned(self, lines: Iterable[Tensor]) -> list[Tensor]:
        """Change between the order of the map and that of the scan."""
        return [t if ahead or len(t) == 1 else t.flip(0) for t, ahead in zip(lines, self.ahead, strict=True)]

    def read(self, maps: Iterable[Tensor], steps: range, dtype: torch.dtype) -> Tensor:
        """The lines of some steps, [n, G, B, M, ...]."""
        return torch.stack(self._turned(self._lines(maps, steps)), 1).to(dtype)

    def read_weights(self, maps: Iterable[Tensor], steps: range, dtype: torch.dtype) -> Tensor:
        """The lines of some steps of maps [B, H, W, 3, C], as a slab of weights [3, n, G, B, M, C]."""
        lines = self._turned(self._lines(maps, steps))
        return torch.stack([t.movedim(3, 0) for t in lines], 2).to(dtype)

    def write(self, maps: Iterable[Tensor], steps: range, slab: Tensor) -> None:
        """The inverse of `read`."""
        for out, t in zip(self._lines(maps, steps), self._turned(slab.unbind(1)), strict=True):
            out.copy_(t)

    def write_weights(self, maps: Iterable[Tensor], steps: range, slab: Tensor) -> None:
        """The inverse of `read_weights`."""
        self.write(maps, steps, slab.movedim(0, -2))

    def add(self, total: Tensor, steps: range, slab: Tensor) -> None:
        """Add the lines of each direction to the map that they share."""
        for out, t in zip(self._lines(self.shared(total), steps), self._turned(slab.unbind(1)), strict=True):
            out.add_(t)


def _groups(codes: Sequence[int], shape: Sequence[int]) -> list[_Group]:
    everything = range(len(codes))
    if shape[1] == shape[2]:
        return [_Group(codes, everything, shape)]
    vertical = [d for d in everything if DIRECTIONS[codes[d]] in ("down", "up")]
    horizontal = [d for d in everything if d not in vertical]
    return [_Group(codes, members, shape) for members in (vertical, horizontal) if members]


def _inner(padded: Tensor) -> Tensor:
    return padded[..., 1:-1, :]


def _neighbours(padded: Tensor) -> Tensor:
    """[..., M + 2, C] -> its view [3, ..., M, C]: positions j-1, j, j+1."""
    return padded.unfold(-2, 3, 1).movedim(-1, 0)


def _mix(weights: Sequence[Tensor], neighbours: Sequence[Tensor]) -> Tensor:
    """W h for the state h of the previous line: the weighted sum over three neighbours."""
    out = torch.mul(weights[1], neighbours[1])
    return out.addcmul_(weights[0], neighbours[0]).addcmul_(weights[2], neighbours[2])


def _spread(weights: Sequence[Tensor] | Tensor, q: Tensor) -> Tensor:
    """W^T q: the gradient that each position receives from its three neighbours on the next line."""
    out = weights[1] * q
    out[:, :, :-1].addcmul_(weights[0][:, :, 1:], q[:, :, 1:])
    out[:, :, 1:].addcmul_(weights[2][:, :, :-1], q[:, :, :-1])
    return out


class _Slab(NamedTuple):
    """The intermediate values of a slab of lines, for forward and backward."""

    steps: range
    outside: Tensor | None  # [n, G, B, M, 1] bool: padding
    sigma: Tensor  # [3, n, G, B, M, C], zero where there is no neighbour
    total: Tensor  # their sum, clamped
    kept: Tensor | None  # the forget gate
    mean: Tensor  # W h of the previous line
    states: Tensor  # padded state before the first line, and of every line


def _counted(t: Tensor, ones: Tensor, each: int) -> Tensor:
    """Append to each group of `each` channels of [..., C] one channel from `ones` [..., groups]."""
    return torch.cat([t.unflatten(-1, (-1, each)), ones.unsqueeze(-1)], -1).flatten(-2)


def _uncounted(t: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_counted`: [..., C] and [..., groups]."""
    channels, ones = t.unflatten(-1, (-1, each + 1)).split([each, 1], -1)
    return channels.flatten(-2), ones.squeeze(-1)


def _scan(group: _Group, scan: Scan) -> Iterator[_Slab]:
    """Yield the slabs of a scan. For a normalised state each group has one more channel, n: the same scan over ones."""
    dtype, each = torch.promote_types(scan.x.dtype, torch.float32), scan.share
    every = each + scan.normalise_state
    xs, scales, scores = group.features(scan.x), group.maps(scan.lam), group.maps(scan.logits)
    last: Tensor | None = None
    outside: Tensor | None = None
    for steps in group.slabs():
        sigma = group.read_weights(scores, steps, dtype)
        if scan.u is not None:
            sigma.sigmoid_()
        sigma[0, ..., 0, :] = 0.0
        sigma[2, ..., -1, :] = 0.0
        scale = group.read(scales, steps, dtype)
        drive = per_channel(scale, each) * group.read(xs, steps, dtype)
        if scan.normalise_state:
            drive = _counted(drive, scale, each)
        kept = None
        if scan.keep is not None:
            kept = per_channel(group.read(group.maps(scan.keep), steps, dtype).sigmoid_(), every)
        if scan.mask is not None:
            inside = group.read(group.shared(scan.mask), steps, torch.bool)[..., None]
            first = torch.zeros_like(inside[:1]) if outside is None else outside[-1:]
            outside = ~inside
            padding = pad(torch.cat([first, outside[:-1]]), (0, 0, 1, 1))  # on the previous line
            sigma.masked_fill_(outside | _neighbours(padding), 0.0)
            drive.masked_fill_(outside, 0.0)  # neither neighbours nor input: the state is zero there
            kept = None if kept is None else kept.masked_fill_(outside, 0.0)
        sigma = per_channel(sigma, every)
        total = torch.ones_like(drive)
        if scan.u is not None:
            total = (sigma[0] + sigma[1]).add_(sigma[2]).clamp_(min=EPSILON)
        states = drive.new_zeros((len(drive) + 1, *drive.shape[1:3], drive.shape[3] + 2, drive.shape[4]))
        if last is not None:
            states[0] = last
        mean = torch.empty_like(drive)
        weights, before = zip(*(t.unbind(0) for t in sigma)), zip(*(t.unbind(0) for t in _neighbours(states)))
        lines = zip(weights, before, drive, total, mean, _inner(states)[1:])
        for k, (w, neighbours, d, sums, m, h) in enumerate(lines):
            if _restarts(scan, steps[k]):
                m.zero_()
            else:
                torch.div(_mix(w, neighbours), sums, out=m)
            torch.add(d, m, out=h) if kept is None else torch.addcmul(d, m, kept[k], out=h)
        last = states[-1]
        yield _Slab(steps, outside, sigma, total, kept, mean, states)


def _restarts(scan: Scan, step: int) -> bool:
    return scan.chunk > 0 and step % scan.chunk == 0


def _gated(slab: _Slab, t: Tensor, gate: Tensor) -> Tensor:
    """gate * t, and zero in the padding, which may hold any value, even NaN."""
    out = t * gate
    return out if slab.outside is None else out.masked_fill_(slab.outside, 0.0)


def _state(slab: _Slab, scan: Scan) -> tuple[Tensor, Tensor]:
    """The input of the gate (the state, divided by n if it is normalised), and n."""
    h = _inner(slab.states)[1:]
    if not scan.normalise_state:
        return h, h
    h, n = _uncounted(h, scan.share)
    return h / per_channel(n.clamp(min=SMALLEST), scan.share), n


def forward(scan: Scan) -> Tensor:
    """The output of `propagate_2d`."""
    x, dtype, each = scan.x, torch.promote_types(scan.x.dtype, torch.float32), scan.share
    y = x.new_zeros(scan.output, dtype=dtype) if scan.merge_sum else x.new_empty(scan.output)
    for group in _groups(scan.directions, (*x.shape[:3], x.shape[-1])):
        for slab in _scan(group, scan):
            out = _state(slab, scan)[0]
            if scan.u is not None:
                out = _gated(slab, out, per_channel(group.read(group.maps(scan.u), slab.steps, dtype), each))
            if scan.merge_sum:
                group.add(y, slab.steps, out)
            else:
                group.write(group.maps(y), slab.steps, out)
    return y.to(x.dtype)


def backward(dy: Tensor, scan: Scan, *_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of `forward` with respect to x, logits, lam, u and keep, in their dtypes and shapes."""
    x, u = scan.x, scan.u
    dtype, each = torch.promote_types(x.dtype, torch.float32), scan.share
    every = each + scan.normalise_state
    dx = x.new_zeros(x.shape, dtype=dtype)
    dlogits, dlam = (t.new_empty(t.shape) for t in scan[1:3])
    du, dkeep = (None if t is None else t.new_empty(t.shape) for t in (u, scan.keep))
    for group in _groups(scan.directions, (*x.shape[:3], x.shape[-1])):
        xs, scales = group.features(x), group.maps(scan.lam)
        dys = group.shared(dy) if scan.merge_sum else group.maps(dy)
        slabs = list(_scan(group, scan))
        from_next: Tensor | None = None  # forget gate times W^T g of the next line
        while slabs:
            slab = slabs.pop()
            steps, kept = slab.steps, slab.kept
            g = grad = group.read(dys, steps, dtype)
            state, n = _state(slab, scan)
            if u is not None and du is not None:
                gate = group.read(group.maps(u), steps, dtype)
                gate_grad = per_set(_gated(slab, state, grad), each)
                group.write(group.maps(du), steps, gate_grad)
                g = _gated(slab, grad, per_channel(gate, each))
            if scan.normalise_state:  # y = u h / n
                n_grad = torch.where(n >= SMALLEST, _gated(slab, gate_grad, gate) / n, 0.0).neg_()
                g = _counted(g / per_channel(n.clamp(min=SMALLEST), each), n_grad, each)
            q = torch.empty_like(g)
            for k in range(len(steps) - 1, -1, -1):
                if from_next is not None:
                    g[k] += from_next
                torch.div(g[k], slab.total[k], out=q[k])
                if kept is not None:
                    q[k] *= kept[k]
                from_next = None if _restarts(scan, steps[k]) else _spread(slab.sigma[:, k], q[k])
            if dkeep is not None and kept is not None:
                wanted = per_set(torch.ops.aten.sigmoid_backward(g * slab.mean, kept), every)
                group.write(group.maps(dkeep), steps, wanted)
            own, of_ones = _uncounted(g, each) if scan.normalise_state else (g, None)
            scale_grad = per_set(_gated(slab, own, group.read(xs, steps, dtype)), each)
            group.write(group.maps(dlam), steps, scale_grad if of_ones is None else scale_grad + of_ones)
            scaled = _gated(slab, own, per_channel(group.read(scales, steps, dtype), each))
            if x.dim() == 5:
                group.write(group.maps(dx), steps, scaled)
            else:
                group.add(dx, steps, scaled)
            # the gradient of sigma_k / total is neighbour k minus the mean, or the neighbour itself if the total is
            # clamped
            centre = slab.mean.zero_() if u is None else slab.mean.masked_fill_(slab.total <= EPSILON, 0.0)
            before = _neighbours(slab.states[:-1])
            dsigma = torch.sub(before, centre, out=torch.empty_like(slab.sigma)).mul_(q)
            if u is not None:
                dsigma = torch.ops.aten.sigmoid_backward(per_set(dsigma, every), slab.sigma[..., ::every])
            for k in (k for k, step in enumerate(steps) if _restarts(scan, step)):
                dsigma[:, k] = 0.0
            group.write_weights(group.maps(dlogits), steps, dsigma)
    return dx.to(x.dtype), dlogits, dlam, du, dkeep
