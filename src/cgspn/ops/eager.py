"""A check that PyTorch runs eagerly on real tensors. Only then may a launch bypass PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat import DeviceContext, dispatch_modes, function_mode_at, function_modes, tracing_state
from .functorch import in_functorch

PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or intercepts operations on these tensors.

    False in torch.compile, torch.export and other tracers, in torch.func and forward-mode AD, under modes such as
    FlopCounterMode and FakeTensorMode, for subclasses of Tensor and for tensors on "meta".
    """
    if torch.compiler.is_compiling() or in_functorch():
        return False
    if dispatch_modes() or tracing_state() is not None:
        return False
    for n in range(function_modes()):
        if not isinstance(function_mode_at(n), DeviceContext):  # DeviceContext only sets the default device
            return False
    if any([t is not None and type(t) not in PLAIN for t in tensors]):  # noqa: C419 (a list is faster)
        return False
    first = tensors[0]
    return first is None or not first.is_meta
