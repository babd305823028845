"""The dtype of torch.autocast, which custom operators and norms must look up themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype on the device of x, or None if autocast is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta tensors have no autocast
        return None
    return torch.get_autocast_dtype(kind)
