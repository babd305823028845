"""The definition of the operator in float64 (docs/operator.md; equations (1) and (2) of the paper).

Shape letters used in this package: B batch, H rows, W columns, C channels, D directions, G groups of C / G channels
with shared parameters, L lines of the scan, M positions of a line, 3 the neighbours j-1, j, j+1.

It is slow. Every backend is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = ("down", "up", "right", "left")
EPSILON = 1e-7  # the sum of the neighbours' sigmoids is clamped below at this
SMALLEST = 1e-6  # n is clamped below at this; in padding n is 0, and so is the output


def _lines(t: Tensor, direction: str) -> list[Tensor]:
    """The lines of a [B, H, W, ...] map in the order in which `direction` visits them, each [B, M, ...]."""
    lines = list(t.unbind(1 + DIRECTIONS.index(direction) // 2))  # down and up go along H, right and left along W
    return lines if direction in ("down", "right") else lines[::-1]


def _grid(lines: list[Tensor], direction: str) -> Tensor:
    """The inverse of `_lines`."""
    if direction in ("up", "left"):
        lines = lines[::-1]
    return torch.stack(lines, 1 if direction in ("down", "up") else 2)


def _neighbours(line: Tensor) -> Tensor:
    """[B, M, ...] -> [B, M, 3, ...]: positions j-1, j, j+1; zero (False) outside the line."""
    edge = torch.zeros_like(line[:, :1])
    return torch.stack([torch.cat([edge, line[:, :-1]], 1), line, torch.cat([line[:, 1:], edge], 1)], 2)


def propagate_2d_reference(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    *,
    keep: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    merge: str = "sum",
    mask: Tensor | None = None,
    normalise_state: bool = False,
) -> Tensor:
    """The definition of `cgspn.ops.propagate_2d` in plain PyTorch, for any device, differentiable any number of times.

    For each direction, over lines i and channels, with h[-1] = 0::

        h[i] = sigmoid(keep[i]) * W[i] h[i-1] + lam[i] * x[i]        y[i] = u[i] * h[i]

    where row j of W[i] holds sigmoid(logits[i, j]) of the neighbours j-1, j, j+1 that exist on line i-1,
    divided by their sum (clamped below at 1e-7), and the factor of `keep` is 1 where it is None. With
    `normalise_state`, y[i] = u[i] * h[i] / n[i], where n is the same recurrence over ones in place of x (clamped below
    at 1e-6).

    Shapes: x [B, H, W, C], or [B, H, W, D, C] with separate features for each direction; logits [B, H, W, D, 3, G];
    lam, u, keep [B, H, W, D, G], where G divides C and channel c belongs to group c // (C / G); mask [B, H, W] bool or
    None. Always returns float64: [B, H, W, C] for merge="sum", [B, H, W, D, C] for "none". Raises ValueError, KeyError
    or IndexError on wrong input; `propagate_2d` has better error messages.
    Paper: "Scaling Parallel Sequence Models to Vision Foundation Models", equations (1) and (2); docs/operator.md.
    """
    if normalise_state:
        options: Any = {"keep": keep, "directions": directions, "merge": "none", "mask": mask}
        ones = torch.ones_like(lam)
        n = propagate_2d_reference(ones, logits, lam, ones, **options).clamp(min=SMALLEST)
        y = propagate_2d_reference(x, logits, lam, u, **options) / n.repeat_interleave(x.shape[-1] // n.shape[-1], -1)
        return y.sum(3) if merge == "sum" else y
    each = x.shape[-1] // lam.shape[-1]
    logits, lam, u = (t.double().repeat_interleave(each, -1) for t in (logits, lam, u))
    kept = torch.ones_like(lam) if keep is None else torch.sigmoid(keep.double()).repeat_interleave(each, -1)
    x = x.double() if x.dim() == 5 else x.double().unsqueeze(3).expand_as(lam)
    inside = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if mask is None else mask
    outputs = []
    for d, direction in enumerate(directions):
        steps = [_lines(t, direction) for t in (*(t[:, :, :, d] for t in (x, logits, lam, u, kept)), inside)]
        h = torch.zeros_like(steps[0][0])
        inside_before = torch.ones_like(steps[5][0])
        lines = []
        for x_BMC, logits_BM3C, lam_BMC, u_BMC, kept_BMC, inside_BM in zip(*steps, strict=True):
            exists_BM3 = _neighbours(inside_before)
            sigma = torch.where(exists_BM3[..., None], torch.sigmoid(logits_BM3C), 0.0)
            weights = sigma / sigma.sum(2, keepdim=True).clamp(min=EPSILON)
            h = kept_BMC * (weights * _neighbours(h)).sum(2) + lam_BMC * x_BMC
            h = torch.where(inside_BM[..., None], h, 0.0)
            lines.append(torch.where(inside_BM[..., None], u_BMC * h, 0.0))
            inside_before = inside_BM
        outputs.append(_grid(lines, direction))
    y = torch.stack(outputs, 3)
    return y.sum(3) if {"sum": True, "none": False}[merge] else y


def line_scan_reference(x: Tensor, weights: Tensor, lam: Tensor, direction: str, chunk: int | None = None) -> Tensor:
    """The definition of `cgspn.ops.line_scan`: one direction with the given weights, without a gate.

    Shapes: x, lam [B, H, W, C]; weights [B, H, W, 3, C]; returns h [B, H, W, C] in float64.
    The state restarts from zero every `chunk` lines, counted in the order of the scan.
    Raises ValueError or IndexError on wrong input; `line_scan` has better error messages.
    Paper: equation (1), and the local variant of the original GSPN.
    """
    steps = [_lines(t.double(), direction) for t in (x, weights, lam)]
    h = torch.zeros_like(steps[0][0])
    lines = []
    for i, (x_BMC, weights_BM3C, lam_BMC) in enumerate(zip(*steps, strict=True)):
        if chunk is not None and i % chunk == 0:
            h = torch.zeros_like(h)
        h = (weights_BM3C * _neighbours(h)).sum(2) + lam_BMC * x_BMC
        lines.append(h)
    return _grid(lines, direction)
