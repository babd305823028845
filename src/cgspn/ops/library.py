"""Registration with torch.library: what torch.compile, export, autograd and FLOP counters see.

Custom ops: forward and backward of `propagate_2d` and of `line_scan`, and a forward for training that also returns
what the backward wants saved. The backend is chosen inside them, so a traced program never sees the choice. The
backward ops are differentiable too, by way of the reference, so a double backward is right on every backend, if slow.
Eager code calls the same functions past the dispatcher, whose way through a custom op takes as long as several
launches: `Propagate` and `LineScan` are those with gradients.
FLOP convention: a multiply-add is two, a division or a sigmoid one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import backend_for
from .functorch import check_reverse
from .reference import DIRECTIONS, line_scan_reference, propagate_2d_reference

Gradients = tuple[Tensor | None, ...]


def propagate_2d_now(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
) -> Tensor:
    """Checked arguments in, tensors out: see `cgspn.ops.propagate_2d`."""
    check_reverse("propagate_2d")
    out: Tensor = backend_for(backend, x).forward(x, logits, lam, u, mask, directions, merge_sum, keep)
    return out


def _maps(x: Tensor, directions: int) -> tuple[int, ...]:
    """The shape of an output for each direction: [B, H, W, D, C]."""
    return (*x.shape[:3], directions, x.shape[-1])


def _output(x: Tensor, directions: Sequence[int], merge_sum: bool) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[-1]) if merge_sum else _maps(x, len(directions)))


propagate_2d_op = torch.library.custom_op("cgspn::propagate_2d", propagate_2d_now, mutates_args=())


@propagate_2d_op.register_fake
def _(x, logits, lam, u, keep, mask, directions, merge_sum, backend):  # type: ignore[no-untyped-def]
    return _output(x, directions, merge_sum)


def propagate_2d_saving_now(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`propagate_2d_op` in training: also the state [B, H, W, D, C] if the backend's backward wants it, else [0]."""
    check_reverse("propagate_2d")
    module = backend_for(backend, x)
    if hasattr(module, "forward_saving"):
        out: tuple[Tensor, Tensor] = module.forward_saving(x, logits, lam, u, mask, directions, merge_sum, keep)
        return out
    return module.forward(x, logits, lam, u, mask, directions, merge_sum, keep), x.new_empty(0)


propagate_2d_saving_op = torch.library.custom_op("cgspn::propagate_2d_saving", propagate_2d_saving_now, mutates_args=())


@propagate_2d_saving_op.register_fake
def _(x, logits, lam, u, keep, mask, directions, merge_sum, backend):  # type: ignore[no-untyped-def]
    saves = hasattr(backend_for(backend, x), "forward_saving")
    return _output(x, directions, merge_sum), x.new_empty(_maps(x, len(directions)) if saves else (0,))


def propagate_2d_backward_now(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `propagate_2d_op` to x, logits, lam, u and keep, [0] for one that is not there.

    `state` is what `propagate_2d_saving_op` returned.
    """
    grads: tuple[Tensor, ...]
    module = backend_for(backend, x)
    if state is None or not hasattr(module, "backward_saved"):
        grads = module.backward(dy, x, logits, lam, u, mask, directions, merge_sum, keep)
    else:
        grads = module.backward_saved(dy, x, logits, lam, u, mask, directions, merge_sum, state, keep)
    dx, dlogits, dlam, du, *rest = grads
    return dx, dlogits, dlam, du, *(rest or [x.new_empty(0)])  # type: ignore[return-value]


propagate_2d_backward_op = torch.library.custom_op(
    "cgspn::propagate_2d_backward", propagate_2d_backward_now, mutates_args=()
)


@propagate_2d_backward_op.register_fake
def _(dy, x, logits, lam, u, keep, mask, directions, merge_sum, backend, state=None):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(0 if t is None else t.shape) for t in (x, logits, lam, u, keep))


def line_scan_now(x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None, backend: str) -> Tensor:
    """Checked arguments in, tensors out: see `cgspn.ops.line_scan`."""
    check_reverse("line_scan")
    out: Tensor = backend_for(backend, x).line_scan_forward(x, weights, lam, direction, chunk)
    return out


line_scan_op = torch.library.custom_op("cgspn::line_scan", line_scan_now, mutates_args=())


@line_scan_op.register_fake
def _(x, weights, lam, direction, chunk, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def line_scan_backward_now(
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


line_scan_backward_op = torch.library.custom_op("cgspn::line_scan_backward", line_scan_backward_now, mutates_args=())


@line_scan_backward_op.register_fake
def _(dh, x, weights, lam, direction, chunk, backend, h=None):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, weights, lam))


def register_first(
    forward_op: Any,
    forward: Callable[..., Any],
    backward_op: Any,
    backward: Callable[..., Any],
    tensors: int,
    *,
    saves: bool = False,
) -> type[torch.autograd.Function]:
    """First derivatives of a forward op through a backward op; and the same of the functions, without the dispatcher.

    tensors: how many arguments are tensors, the first ones; a backward returns their gradients in order. saves: it also
    takes, last, the forward's last output: the state, if there are several.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        state = outputs[-1:] if saves else ()
        if len(outputs) > 1:
            ctx.mark_non_differentiable(*state)
            ctx.set_materialize_grads(False)  # or the state would get a gradient map of zeros
        ctx.save_for_backward(*inputs[:tensors], *state)
        ctx.rest = inputs[tensors:]

    def through(run: Callable[..., Any], ctx: Any, dy: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # once: what is recomputed under checkpointing can be unpacked only once
        if dy is None:  # nothing depends on the output
            return (None,) * (len(ctx.rest) + tensors)
        found = run(dy, *saved[:tensors], *ctx.rest, *saved[tensors:])
        grads = [None if t is None else g for t, g in zip(saved[:tensors], found)]
        return *grads, *[None] * (len(ctx.rest) + tensors - len(grads))

    forward_op.register_autograd(lambda ctx, dy, *_: through(backward_op, ctx, dy), setup_context=setup)

    class Direct(torch.autograd.Function):
        """Forward and backward called as they are."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            """The function's own outputs. With a `setup_context` PyTorch would bind the arguments at each call."""
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, *_: None) -> Gradients:
            """The op where a gradient of this gradient is wanted."""
            return through(backward_op if torch.is_grad_enabled() else backward, ctx, dy)

    return Direct


def leaf_of(t: Tensor, graph: bool) -> Tensor:
    """`t` to take derivatives to; with `graph`, what is made of it has derivatives to what `t` is made of, too."""
    return t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_()


def _register_second(backward_op: Any, tensors: int, reference: Callable[..., Tensor]) -> None:
    """Second and higher derivatives through the reference: right on every backend, if slow."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: tensors + 1])
        ctx.rest = inputs[tensors + 1 :]

    def backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
        graph = torch.is_grad_enabled()  # create_graph of the caller: without it third derivatives would lack terms
        with torch.enable_grad():
            dy, *inputs = ctx.saved_tensors  # keep and mask may be None, and a mask has no gradient
            wanted = [k for k, t in enumerate(inputs[: len(cotangents)]) if t is not None]
            dy = leaf_of(dy, graph)
            for k in wanted:
                inputs[k] = leaf_of(inputs[k], graph)
            leaves: list[Tensor] = [dy, *(inputs[k] for k in wanted)]
            y = reference(*inputs, *ctx.rest[:-1])  # all but the state, which is a function of the others
            first = torch.autograd.grad(y, leaves[1:], dy.to(y.dtype), create_graph=True)
            asked = [cotangents[k] for k in wanted]
            pairs = [(g, c.to(g.dtype)) for g, c in zip(first, asked, strict=True) if c is not None]
            second = torch.autograd.grad(
                [g for g, _ in pairs], leaves, [c for _, c in pairs], create_graph=graph, allow_unused=True
            )
        found: list[Tensor | None] = [None] * (len(ctx.rest) + tensors + 1)
        for place, gradient in zip([0, *(k + 1 for k in wanted)], second, strict=True):
            found[place] = gradient
        return tuple(found)

    backward_op.register_autograd(backward, setup_context=setup)


PROPAGATE_TENSORS = 6  # x, logits, lam, u, keep and the mask, which has no gradient
LINE_SCAN_TENSORS = 3  # x, weights, lam

Propagate = register_first(
    propagate_2d_saving_op,
    propagate_2d_saving_now,
    propagate_2d_backward_op,
    propagate_2d_backward_now,
    PROPAGATE_TENSORS,
    saves=True,
)
# `propagate_2d` takes the saving op where a gradient is wanted; this is for a program traced without one
register_first(
    propagate_2d_op, propagate_2d_now, propagate_2d_backward_op, propagate_2d_backward_now, PROPAGATE_TENSORS
)
_register_second(
    propagate_2d_backward_op,
    PROPAGATE_TENSORS,
    lambda x, logits, lam, u, keep, mask, directions, merge_sum, backend: propagate_2d_reference(
        x,
        logits,
        lam,
        u,
        keep=keep,
        mask=mask,
        directions=[DIRECTIONS[code] for code in directions],
        merge="sum" if merge_sum else "none",
    ),
)
LineScan = register_first(
    line_scan_op, line_scan_now, line_scan_backward_op, line_scan_backward_now, LINE_SCAN_TENSORS, saves=True
)
_register_second(
    line_scan_backward_op,
    LINE_SCAN_TENSORS,
    lambda x, weights, lam, direction, chunk, backend: line_scan_reference(
        x, weights, lam, DIRECTIONS[direction], chunk
    ),
)


# Per position and direction. Forward, of a set of parameters: 3 sigmoids, 2 adds, 3 divisions; of a channel: 3
# multiply-adds of the recurrence plus lam * x as a fourth; the gate; the merge. The forget gate: a sigmoid, 3 products.
# Backward, of a set: the normalisation again (8) and its gradient (subtract, divide, two products and 1 - s: 15); of a
# channel: the recurrence again (8), the adjoint scan (6), dh, du, dlam, dx (4 + 1 add), dweights (3), their shared sum
# (5). The forget gate: as before, and its own gradient (4).
FLOPS_FORWARD = {"normalise": 8, "recurrence": 8, "gate_and_merge": 2}
FLOPS_BACKWARD = 8 + 8 + 6 + 5 + 3 + 20
FLOPS_SETS = {"forward": FLOPS_FORWARD["normalise"], "backward": 8 + 15}
FLOPS_KEEP = {"forward": 4, "backward": 8}


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _scan_flops(which: str, each: int, x_shape: Sequence[int], lam_shape: Sequence[int], keep_shape: Any) -> int:
    """FLOPs of a pass that costs `each` for a channel with parameters of its own."""
    sets, of_set = _elements(lam_shape), FLOPS_SETS[which]
    channels = sets // lam_shape[-1] * x_shape[-1]
    return channels * (each - of_set) + sets * (of_set + (0 if keep_shape is None else FLOPS_KEEP[which]))


@register_flop_formula([torch.ops.cgspn.propagate_2d, torch.ops.cgspn.propagate_2d_saving])
def _(x_shape, logits_shape, lam_shape, u_shape, keep_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _scan_flops("forward", sum(FLOPS_FORWARD.values()), x_shape, lam_shape, keep_shape)


@register_flop_formula(torch.ops.cgspn.propagate_2d_backward)
def _(dy_shape, x_shape, logits_shape, lam_shape, u_shape, keep_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _scan_flops("backward", FLOPS_BACKWARD, x_shape, lam_shape, keep_shape)


@register_flop_formula(torch.ops.cgspn.line_scan)
def _(x_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _elements(x_shape) * FLOPS_FORWARD["recurrence"]


@register_flop_formula(torch.ops.cgspn.line_scan_backward)
def _(dh_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _elements(dh_shape) * (FLOPS_FORWARD["recurrence"] + 6 + 2 + 3)
