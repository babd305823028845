"""Norms that stay in the precision of autocast: float32 inside the kernel, what they read and write in its dtype.

torch.autocast runs norms in float32 from input to output. A residual stream then doubles its bytes, and every product
after a norm begins with a cast: at the widths of encoders that costs more than the products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from ..compat import is_tracing
from ..ops.autocast import autocast_dtype
from ..ops.fused import rows


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in another dtype, if there is one."""
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
        """Whether gradients will be wanted that the kernels can give; dtype: as of autocast, None without."""
        if not torch.is_grad_enabled() or is_tracing() or self.weight is None or self.eps is None:
            return False
        kept = dtype in (None, x.dtype) and (dtype is not None or self.weight.dtype == x.dtype)
        small = len(self.normalized_shape) == 1 and x.shape[-1] <= rows.CHANNELS_MOST
        return kept and small and rows.can_use_rows(x)


def add_norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None = None, after: Tensor | None = None, *, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """norm(t) of t = x + branch, and t + after: [..., C] each. The second is what goes past the norm.

    branch: [..., C], None for nothing; after: [C], in inference. fused: a LayerNorm in one pass over memory with the
    sums before and after it; in training the gradients of both outputs meet in one pass.
    """
    if fused and (branch is None or branch.dtype == x.dtype):
        if torch.is_grad_enabled():
            both: tuple[Tensor, Tensor] = rows.AddNorm.apply(x, branch, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
            return both
        normal, total, _ = rows.forward(x, branch, norm.weight, norm.bias, norm.eps, after)  # type: ignore[arg-type]
        return normal, total
    total = x if branch is None else x + branch
    return norm(total), total if after is None else total + after.to(total.dtype)
