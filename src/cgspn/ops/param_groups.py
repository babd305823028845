"""Broadcast from parameter groups to channels, and its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(sets: Tensor, each: int) -> Tensor:
    """Repeat the values [..., G] of parameter groups for the `each` channels of each group."""
    return sets if each == 1 else sets.repeat_interleave(each, -1)


def per_set(channels: Tensor, each: int) -> Tensor:
    """The adjoint of `per_channel`: the sum over the channels of a group, in float32 or wider."""
    if each == 1:
        return channels
    wide = torch.promote_types(channels.dtype, torch.float32)
    return channels.unflatten(-1, (-1, each)).sum(-1, dtype=wide).to(channels.dtype)
