"""Norms that read and write the autocast dtype, and compute in float32.

torch.autocast returns float32 from norms. That doubles the bytes of the residual stream, and adds a cast before every
product after a norm, which at the widths of encoders costs more than the products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from ..compat import is_tracing
from ..ops.autocast import autocast_dtype
from ..ops.fused import rows


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert `tensor` to another dtype; None stays None."""
    return None if tensor is None else tensor.to(dtype)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`: [..., C] -> [..., C], in autocast's dtype where that is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Any dtype."""
        dtype = autocast_dtype(x)
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = cast(self.weight, dtype), cast(self.bias, dtype)
            return layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`: [..., C] -> [..., C], in autocast's dtype where that is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Any dtype."""
        dtype = autocast_dtype(x)
        if self._in_one_pass(x, dtype):
            with torch.autocast(x.device.type, enabled=False):
                trained: Tensor = rows.RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
                return trained
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x.to(dtype), self.normalized_shape, cast(self.weight, dtype), self.eps)

    def _in_one_pass(self, x: Tensor, dtype: torch.dtype | None) -> bool:
        """Whether gradients are needed and the kernels can compute them. dtype: the autocast dtype or None."""
        if not torch.is_grad_enabled() or is_tracing() or self.weight is None or self.eps is None:
            return False
        kept = dtype in (None, x.dtype) and (dtype is not None or self.weight.dtype == x.dtype)
        small = len(self.normalized_shape) == 1 and x.shape[-1] <= rows.CHANNELS_MOST
        return kept and small and rows.can_use_rows(x)


def add_norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None = None, after: Tensor | None = None, *, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """norm(t) and t + after for t = x + branch: [..., C] each. The second is the residual stream.

    branch: [..., C] or None; after: [C], only in inference. fused: a LayerNorm with both additions in one pass over
    memory; in training one pass also adds the gradients of both outputs.
    """
    if fused and (branch is None or branch.dtype == x.dtype):
        if torch.is_grad_enabled():
            both: tuple[Tensor, Tensor] = rows.AddNorm.apply(x, branch, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
            return both
        normal, total, _ = rows.forward(x, branch, norm.weight, norm.bias, norm.eps, after)  # type: ignore[arg-type]
        return normal, total
    total = x if branch is None else x + branch
    return norm(total), total if after is None else total + after.to(total.dtype)
