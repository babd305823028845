"""Norms that stay in the precision of autocast: float32 inside the kernel, what they read and write in its dtype.

torch.autocast runs norms in float32 from input to output. A residual stream then doubles its bytes, and every product
after a norm begins with a cast: at the widths of encoders that costs more than the products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from ..ops.autocast import lowered


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in another dtype, if there is one."""
    return None if tensor is None else tensor.to(dtype)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`: [..., C] -> [..., C], in autocast's dtype where that is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Any dtype."""
        dtype = lowered(x)
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = cast(self.weight, dtype), cast(self.bias, dtype)
            return layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`: [..., C] -> [..., C], in autocast's dtype where that is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Any dtype."""
        dtype = lowered(x)
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x.to(dtype), self.normalized_shape, cast(self.weight, dtype), self.eps)
