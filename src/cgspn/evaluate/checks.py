"""Argument checks of the metrics. Each error names the argument, its value and the accepted values."""

from __future__ import annotations

import torch
from torch import Tensor


def check_matrix(name: str, t: Tensor, letters: str) -> None:
    """Raise ValueError unless `t` is a non-empty, finite matrix; `letters` names its dimensions in the message."""
    if t.ndim != 2 or 0 in t.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {letters}, not empty")
    check_finite(name, t)


def check_finite(name: str, t: Tensor) -> None:
    """Raise ValueError if `t` holds NaN or infinity, for which a metric could silently return a number."""
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"{name} holds values that are not finite; accepted: finite values only")


def check_ids(name: str, t: Tensor, count: int, letters: str) -> None:
    """Raise TypeError or ValueError unless `t` is an integer vector of `count` elements."""
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {t.dtype}; accepted: integers")
    if tuple(t.shape) != (count,):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {letters} = ({count},)")
