"""Registration with torch.library: what torch.compile, export, autograd and FLOP counters see.

Four custom ops: forward and backward of `propagate_2d` and of `line_scan`. The backend is chosen inside them, so a
traced program never sees the choice. The backward ops are differentiable too, by
way of the reference, so a double backward is right on every backend, if slow.
FLOP convention: a multiply-add is two, a division or a sigmoid one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import backend_for
from .reference import DIRECTIONS, line_scan_reference, propagate_2d_reference

Gradients = tuple[Tensor | None, ...]


@torch.library.custom_op("cgspn::propagate_2d", mutates_args=())
def propagate_2d_op(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
) -> Tensor:
    """Checked arguments in, tensors out: see `cgspn.ops.propagate_2d`."""
    out: Tensor = backend_for(backend, x).forward(x, logits, lam, u, mask, directions, merge_sum)
    return out


@propagate_2d_op.register_fake
def _(x, logits, lam, u, mask, directions, merge_sum, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape if merge_sum else u.shape)


@torch.library.custom_op("cgspn::propagate_2d_backward", mutates_args=())
def propagate_2d_backward_op(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `propagate_2d_op` to x, logits, lam, u."""
    grads: tuple[Tensor, Tensor, Tensor, Tensor]
    grads = backend_for(backend, x).backward(dy, x, logits, lam, u, mask, directions, merge_sum)
    return grads


@propagate_2d_backward_op.register_fake
def _(dy, x, logits, lam, u, mask, directions, merge_sum, backend):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, logits, lam, u))


@torch.library.custom_op("cgspn::line_scan", mutates_args=())
def line_scan_op(x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None, backend: str) -> Tensor:
    """Checked arguments in, tensors out: see `cgspn.ops.line_scan`."""
    out: Tensor = backend_for(backend, x).line_scan_forward(x, weights, lam, direction, chunk)
    return out


@line_scan_op.register_fake
def _(x, weights, lam, direction, chunk, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("cgspn::line_scan_backward", mutates_args=())
def line_scan_backward_op(
    dh: Tensor, x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `line_scan_op` to x, weights, lam."""
    grads: tuple[Tensor, Tensor, Tensor]
    grads = backend_for(backend, x).line_scan_backward(dh, x, weights, lam, direction, chunk)
    return grads


@line_scan_backward_op.register_fake
def _(dh, x, weights, lam, direction, chunk, backend):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, weights, lam))


def _register_autograd(forward_op: Any, backward_op: Any, tensors: int, reference: Callable[..., Tensor]) -> None:
    """First derivatives through the backend's own backward; second ones through the reference."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]

    def backward(ctx: Any, dy: Tensor) -> Gradients:
        grads = backward_op(dy, *ctx.saved_tensors, *ctx.rest)
        return *grads, *[None] * (len(ctx.rest) + tensors - len(grads))

    def setup_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: tensors + 1])
        ctx.rest = inputs[tensors + 1 :]

    def backward_twice(ctx: Any, *cotangents: Tensor | None) -> Gradients:
        with torch.enable_grad():
            dy, *inputs = (t if t is None else t.detach() for t in ctx.saved_tensors)
            leaves: list[Tensor] = [leaf.requires_grad_() for leaf in (dy, *inputs[: len(cotangents)])]
            y = reference(*inputs, *ctx.rest)
            first = torch.autograd.grad(y, leaves[1:], dy.to(y.dtype), create_graph=True)
            pairs = [(g, c.to(g.dtype)) for g, c in zip(first, cotangents, strict=True) if c is not None]
            second = torch.autograd.grad([g for g, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
        return *second, *[None] * (len(ctx.rest) + tensors + 1 - len(second))

    forward_op.register_autograd(backward, setup_context=setup)
    backward_op.register_autograd(backward_twice, setup_context=setup_twice)


_register_autograd(
    propagate_2d_op,
    propagate_2d_backward_op,
    5,  # the mask is a tensor without a gradient
    lambda x, logits, lam, u, mask, directions, merge_sum, backend: propagate_2d_reference(
        x,
        logits,
        lam,
        u,
        mask=mask,
        directions=[DIRECTIONS[code] for code in directions],
        merge="sum" if merge_sum else "none",
    ),
)
_register_autograd(
    line_scan_op,
    line_scan_backward_op,
    3,
    lambda x, weights, lam, direction, chunk, backend: line_scan_reference(
        x, weights, lam, DIRECTIONS[direction], chunk
    ),
)

# Per position, channel and direction. Forward: 3 sigmoids, 2 adds, 3 divisions; 3 multiply-adds of the recurrence
# plus lam * x as a fourth; the gate; the merge.
# Backward: the forward's scan again (no gate: 16), the adjoint scan (6), dh, du, dlam, dx (4 + 1 add),
# dweights (3), and the normalisation's gradient (shared sum 5, then subtract, divide, two products and 1 - s: 15).
FLOPS_FORWARD = {"normalise": 8, "recurrence": 8, "gate_and_merge": 2}
FLOPS_BACKWARD = 16 + 6 + 5 + 3 + 20


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


@register_flop_formula(torch.ops.cgspn.propagate_2d)
def _(x_shape, logits_shape, lam_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _elements(lam_shape) * sum(FLOPS_FORWARD.values())


@register_flop_formula(torch.ops.cgspn.propagate_2d_backward)
def _(dy_shape, x_shape, logits_shape, lam_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _elements(lam_shape) * FLOPS_BACKWARD


@register_flop_formula(torch.ops.cgspn.line_scan)
def _(x_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _elements(x_shape) * FLOPS_FORWARD["recurrence"]


@register_flop_formula(torch.ops.cgspn.line_scan_backward)
def _(dh_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _elements(dh_shape) * (FLOPS_FORWARD["recurrence"] + 6 + 2 + 3)
