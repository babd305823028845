"""Registration of the projected operator, in the same way as library.py.

The op chooses inside where its parameters go, like the backend, so a traced program does not contain the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from .arguments import PARAMETERS, PROJECTED_SCHEMA, ProjectedScan, split_parameters
from .backends import backend_for
from .cuda import projected as chip_kernels
from .functorch import check_reverse
from .library import (
    FLOPS_BACKWARD,
    FLOPS_FORWARD,
    by_definition,
    register_backward,
    register_flops,
    register_forward,
)
from .replay import column_sums, empty, linear, matmul


def _on_chip(p: ProjectedScan) -> bool:
    if p.parameters == "chip":
        reason = chip_kernels.unsupported_reason(p.x)
        if reason is not None:
            raise RuntimeError(f"parameters='chip' cannot run here: {reason}")
        return True
    if p.parameters == "memory" or p.backend not in ("auto", "cuda"):
        return False
    return chip_kernels.is_faster(p.x, p.directions)


def projected_now(*arguments: Any) -> Tensor:
    """The output for the fields of a `ProjectedScan`. Only its arguments are saved for the backward."""
    p = ProjectedScan(*arguments)
    check_reverse("propagate_2d_projected")
    if _on_chip(p):
        return chip_kernels.forward(p)
    out: Tensor = backend_for(p.backend, p.x).forward(p.scan(linear(p.x, p.weight, p.bias)))
    return out


def _output(*arguments: Any) -> Tensor:
    p = ProjectedScan(*arguments)
    return p.x.new_empty(p.x.shape if p.merge_sum else (*p.x.shape[:3], len(p.directions), p.x.shape[3]))


def projected_backward_now(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `projected_op` with respect to x, weight and bias; [0] if there is no bias.

    Parameters and state are recomputed in memory.
    """
    p = ProjectedScan(*arguments)
    x, weight, bias, mask = p[:4]
    module, scan = backend_for(p.backend, x), p.scan(linear(x, weight, bias))
    if hasattr(module, "forward_saving"):
        # gradients are laid out like the projection's output, so that x and weight take one product each
        packed = empty((*x.shape[:3], weight.shape[0]), x.dtype, x.device)
        h = module.forward_saving(scan._replace(merge_sum=False))[1]
        dlogits, dlam, du = split_parameters(packed, len(p.directions))
        dx = module.backward(dy, scan, h, into=(dlam, du, dlogits))[0]
    else:
        dx, dlogits, dlam, du, _ = module.backward(dy, scan)
        packed = torch.cat([dlam.unsqueeze(-2), du.unsqueeze(-2), dlogits], -2)
    seen = x if mask is None else x.where(mask[..., None], 0)  # padding may hold any value
    flat, seen = packed.view(-1, weight.shape[0]), seen.reshape(-1, x.shape[-1])
    dx = matmul(flat, weight, dx.reshape(-1, x.shape[-1])).view(x.shape)
    return dx, matmul(flat.T, seen), x.new_empty(0) if bias is None else column_sums(flat)


def _by_definition(*arguments: Any) -> Tensor:
    """The projection and the reference scan in float64."""
    p = ProjectedScan(*arguments)
    x = p.x.double() if p.mask is None else p.x.double().where(p.mask[..., None], 0.0)
    packed = plain_linear(x, p.weight.double(), None if p.bias is None else p.bias.double())
    return by_definition(*p._replace(x=x).scan(packed)[:-1])


projected_backward_op = register_backward(
    "propagate_2d_projected_backward", PROJECTED_SCHEMA, projected_backward_now, _by_definition, 3
)
projected_op, Projected = register_forward(
    "propagate_2d_projected", PROJECTED_SCHEMA, projected_now, _output, projected_backward_op, projected_backward_now
)


def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], projections: int, each: int) -> int:
    """FLOPs of this many products of the projection's size, plus `each` per element of a map [B, H, W, D, C]."""
    positions = torch.Size(x_shape[:3]).numel()
    elements = positions * weight_shape[0] // PARAMETERS
    return 2 * projections * positions * torch.Size(weight_shape).numel() + elements * each


register_flops(
    lambda x, weight, *_: _flops(x, weight, 1, sum(FLOPS_FORWARD.values())), torch.ops.cgspn.propagate_2d_projected
)
# the recomputed projection and its two gradients
register_flops(
    lambda dy, x, weight, *_: _flops(x, weight, 3, FLOPS_BACKWARD), torch.ops.cgspn.propagate_2d_projected_backward
)
