"""Registration of the projected operator whose parameters stay on the chip: see library.py, which this follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .library import FLOPS_BACKWARD, FLOPS_FORWARD
from .reference import DIRECTIONS, propagate_2d_reference

PARAMETERS = 5  # maps a direction: lam, u, three logits


def _kernels(x: Tensor) -> Any:
    """The module with the kernels. Raises RuntimeError, with the reason, where they cannot run on `x`."""
    from .cuda import projected

    reason = projected.why_not(x)
    if reason is not None:
        raise RuntimeError(f"parameters='chip' cannot run here: {reason}")
    return projected


@torch.library.custom_op("cgspn::propagate_2d_projected", mutates_args=())
def projected_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, directions: Sequence[int], merge_sum: bool
) -> Tensor:
    """Checked arguments in, tensors out: see `cgspn.ops.propagate_2d_projected`."""
    out: Tensor = _kernels(x).forward(x, weight, bias, mask, directions, merge_sum)
    return out


@projected_op.register_fake
def _(x, weight, bias, mask, directions, merge_sum):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape if merge_sum else (*x.shape[:3], len(directions), x.shape[3]))


@torch.library.custom_op("cgspn::propagate_2d_projected_backward", mutates_args=())
def projected_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `projected_op` to x, weight and bias; that of the bias also where there is none."""
    grads: tuple[Tensor, Tensor, Tensor] = _kernels(x).backward(dy, x, weight, bias, mask, directions, merge_sum)
    return grads


@projected_backward_op.register_fake
def _(dy, x, weight, bias, mask, directions, merge_sum):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = projected_backward_op(dy, *ctx.saved_tensors, *ctx.rest)
    return dx, dweight, None if ctx.saved_tensors[2] is None else dbias, None, None, None


projected_op.register_autograd(_backward, setup_context=_setup)


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _second_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second derivatives through the reference: right, if slow."""
    directions, merge_sum = ctx.rest
    with torch.enable_grad():
        dy, x, weight, bias, mask = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in (dy, x, weight) + (() if bias is None else (bias,))]
        features = leaves[1].double()
        if mask is not None:
            features = features.where(mask[..., None], 0.0)
        packed = features @ leaves[2].double().T
        if bias is not None:
            packed = packed + leaves[3].double()
        packed = packed.unflatten(-1, (len(directions), PARAMETERS, x.shape[-1]))
        y = propagate_2d_reference(
            features,
            packed[..., 2:, :],
            packed[..., 0, :],
            packed[..., 1, :],
            mask=mask,
            directions=[DIRECTIONS[code] for code in directions],
            merge="sum" if merge_sum else "none",
        )
        first = torch.autograd.grad(y, leaves[1:], leaves[0].double(), create_graph=True)
        pairs = [(g, c.to(g.dtype)) for g, c in zip(first, cotangents) if c is not None]
        second = torch.autograd.grad([g for g, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
    return *second, *[None] * (7 - len(second))


projected_backward_op.register_autograd(_second_backward, setup_context=_second_setup)


def _counts(x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int]:
    """Of one projection, and elements of one map of all directions."""
    positions = torch.Size(x_shape[:3]).numel()
    return 2 * positions * torch.Size(weight_shape).numel(), positions * weight_shape[0] // PARAMETERS


@register_flop_formula(torch.ops.cgspn.propagate_2d_projected)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    projection, elements = _counts(x_shape, weight_shape)
    return projection + elements * sum(FLOPS_FORWARD.values())


@register_flop_formula(torch.ops.cgspn.propagate_2d_projected_backward)
def _(dy_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # the projection again, and its two gradients
    projection, elements = _counts(x_shape, weight_shape)
    return 3 * projection + elements * FLOPS_BACKWARD
