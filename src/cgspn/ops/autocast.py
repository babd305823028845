"""The dtype that torch.autocast asks for: what custom operators and norms must look up by themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of x, or None outside of it."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta tensors have no autocast
        return None
    return torch.get_autocast_dtype(kind)
