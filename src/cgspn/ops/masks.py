"""A mask expressed by the other inputs of a scan, for backends whose recurrence knows no masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arguments import Scan

PREVIOUS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # from a position to its place on the previous line, by direction


def zero_padding(t: Tensor, mask: Tensor | None) -> Tensor:
    """A map [B, H, W, ...] with zeros where the mask is False; padding may hold any value, even NaN."""
    return t if mask is None else t.masked_fill(~mask.view(*mask.shape, *[1] * (t.dim() - 3)), 0.0)


def without_mask(scan: Scan) -> Scan:
    """The same scan without a mask: padding has no input and no gate, and the weight of every neighbour in it is 0."""
    mask, (h, w) = scan.mask, scan.x.shape[1:3]
    if mask is None:
        return scan
    around = pad(mask, (1, 1, 1, 1), value=True)
    exists = []
    for code in scan.directions:
        down, right = PREVIOUS[code]
        near = [(1 + (down or k), 1 + (right or k)) for k in (-1, 0, 1)]
        exists.append(torch.stack([around[:, y : y + h, x : x + w] & mask for y, x in near], -1))
    logits = scan.logits.masked_fill(~torch.stack(exists, 3)[..., None], -torch.inf)
    filled: list[Any] = [None if t is None else zero_padding(t, mask) for t in (scan.x, *scan[2:5])]
    x, lam, u, keep = filled
    return scan._replace(x=x, logits=logits, lam=lam, u=u, keep=keep, mask=None)
