"""Registration with torch.library: what torch.compile, export, autograd and FLOP counters see.

Custom ops: forward and backward of `propagate_2d` and of `line_scan`, and a forward for training that also returns
what the backward wants saved. The backend is chosen inside them, so a traced program never sees the choice. The
backward ops are differentiable too, by way of the reference, so a double backward is right on every backend, if slow.
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


@torch.library.custom_op("cgspn::propagate_2d_saving", mutates_args=())
def propagate_2d_saving_op(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`propagate_2d_op` in training: also the state [B, H, W, D, C] if the backend's backward wants it, else [0]."""
    module = backend_for(backend, x)
    if hasattr(module, "forward_saving"):
        out: tuple[Tensor, Tensor] = module.forward_saving(x, logits, lam, u, mask, directions, merge_sum)
        return out
    return module.forward(x, logits, lam, u, mask, directions, merge_sum), x.new_empty(0)


@propagate_2d_saving_op.register_fake
def _(x, logits, lam, u, mask, directions, merge_sum, backend):  # type: ignore[no-untyped-def]
    saves = hasattr(backend_for(backend, x), "forward_saving")
    return x.new_empty(x.shape if merge_sum else u.shape), x.new_empty(u.shape if saves else (0,))


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
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `propagate_2d_op` to x, logits, lam, u. `state` is what `propagate_2d_saving_op` returned."""
    grads: tuple[Tensor, Tensor, Tensor, Tensor]
    module = backend_for(backend, x)
    if state is None or not hasattr(module, "backward_saved"):
        grads = module.backward(dy, x, logits, lam, u, mask, directions, merge_sum)
    else:
        grads = module.backward_saved(dy, x, logits, lam, u, mask, directions, merge_sum, state)
    return grads


@propagate_2d_backward_op.register_fake
def _(dy, x, logits, lam, u, mask, directions, merge_sum, backend, state=None):  # type: ignore[no-untyped-def]
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
    dh: Tensor,
    x: Tensor,
    weights: Tensor,
    lam: Tensor,
    direction: int,
    chunk: int | None,
    backend: str,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `line_scan_op` to x, weights, lam. `h` is what `line_scan_op` returned."""
    grads: tuple[Tensor, Tensor, Tensor]
    module = backend_for(backend, x)
    if h is None or not hasattr(module, "line_scan_backward_saved"):
        grads = module.line_scan_backward(dh, x, weights, lam, direction, chunk)
    else:
        grads = module.line_scan_backward_saved(dh, x, weights, lam, direction, chunk, h)
    return grads


@line_scan_backward_op.register_fake
def _(dh, x, weights, lam, direction, chunk, backend, h=None):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, weights, lam))


def _register_first(forward_op: Any, backward_op: Any, tensors: int) -> None:
    """First derivatives of a forward op through the backend's own backward. Its last output is the state to save."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        state = output
        if isinstance(output, tuple):
            state = output[-1]
            ctx.mark_non_differentiable(state)
            ctx.set_materialize_grads(False)  # or the state would get a gradient map of zeros
        ctx.save_for_backward(*inputs[:tensors], state)
        ctx.rest = inputs[tensors:]

    def backward(ctx: Any, dy: Tensor | None, *unused: None) -> Gradients:
        *saved, state = ctx.saved_tensors
        if dy is None:  # nothing depends on the output
            return (None,) * (len(ctx.rest) + tensors)
        grads = backward_op(dy, *saved, *ctx.rest, state)
        return *grads, *[None] * (len(ctx.rest) + tensors - len(grads))

    forward_op.register_autograd(backward, setup_context=setup)


def _register_second(backward_op: Any, tensors: int, reference: Callable[..., Tensor]) -> None:
    """Second derivatives through the reference: right on every backend, if slow."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: tensors + 1])
        ctx.rest = inputs[tensors + 1 :]

    def backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
        with torch.enable_grad():
            saved: list[Any] = [t if t is None else t.detach() for t in ctx.saved_tensors]  # only the mask may be None
            dy, *inputs = saved
            leaves: list[Tensor] = [leaf.requires_grad_() for leaf in (dy, *inputs[: len(cotangents)])]
            y = reference(*inputs, *ctx.rest[:-1])  # all but the state, which is a function of the others
            first = torch.autograd.grad(y, leaves[1:], dy.to(y.dtype), create_graph=True)
            pairs = [(g, c.to(g.dtype)) for g, c in zip(first, cotangents, strict=True) if c is not None]
            second = torch.autograd.grad([g for g, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
        return *second, *[None] * (len(ctx.rest) + tensors + 1 - len(second))

    backward_op.register_autograd(backward, setup_context=setup)


PROPAGATE_TENSORS = 5  # x, logits, lam, u and the mask, which has no gradient
LINE_SCAN_TENSORS = 3  # x, weights, lam

_register_first(propagate_2d_saving_op, propagate_2d_backward_op, PROPAGATE_TENSORS)
_register_second(
    propagate_2d_backward_op,
    PROPAGATE_TENSORS,
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
_register_first(line_scan_op, line_scan_backward_op, LINE_SCAN_TENSORS)
_register_second(
    line_scan_backward_op,
    LINE_SCAN_TENSORS,
    lambda x, weights, lam, direction, chunk, backend: line_scan_reference(
        x, weights, lam, DIRECTIONS[direction], chunk
    ),
)


def _propagate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:PROPAGATE_TENSORS])
    ctx.rest = inputs[PROPAGATE_TENSORS:]


def _propagate_backward(ctx: Any, dy: Tensor) -> Gradients:
    # `propagate_2d` takes the saving op where a gradient is wanted; this is for a program traced without one.
    return *propagate_2d_backward_op(dy, *ctx.saved_tensors, *ctx.rest), *[None] * (len(ctx.rest) + 1)


propagate_2d_op.register_autograd(_propagate_backward, setup_context=_propagate_setup)

# Per position, channel and direction. Forward: 3 sigmoids, 2 adds, 3 divisions; 3 multiply-adds of the recurrence
# plus lam * x as a fourth; the gate; the merge.
# Backward: the forward's scan again (no gate: 16), the adjoint scan (6), dh, du, dlam, dx (4 + 1 add),
# dweights (3), and the normalisation's gradient (shared sum 5, then subtract, divide, two products and 1 - s: 15).
FLOPS_FORWARD = {"normalise": 8, "recurrence": 8, "gate_and_merge": 2}
FLOPS_BACKWARD = 16 + 6 + 5 + 3 + 20


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


@register_flop_formula([torch.ops.cgspn.propagate_2d, torch.ops.cgspn.propagate_2d_saving])
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
